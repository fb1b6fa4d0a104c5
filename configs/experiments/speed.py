"""Speed against context and slots.

    python run.py experiment --config=configs/experiments/speed.py --workdir=runs/speed
    python run.py experiment --config=configs/experiments/speed.py:long --model=my.gguf \\
        --workdir=runs/my-speed

Needs nothing but the package; 16 points, three minutes on two CPU cores. Each
point is warmed up and measured seven times. Expect many slots to decode almost as fast as one
while weights are what is read, so tokens/s grow with them, and to fall slowly with context.
"""

from ml_collections import ConfigDict

from qwen_jax.experiments import Sweep, axis, product
from qwen_jax.settings import get_config as defaults

CONTEXTS = {"": (32, 96, 224, 448), "long": (128, 1024, 4096, 16384)}


def get_config(variant: str = "") -> ConfigDict:
    """The config; `variant` is "" or "long", which needs a context of 32,768."""
    if variant not in CONTEXTS:
        raise ValueError(f"speed.py has no variant {variant!r}, only 'long'")
    config = defaults()
    config.experiment.task = "bench"
    config.experiment.bench.repeats = 7
    return config


def get_sweep(variant: str = "") -> Sweep:
    return product(
        axis("experiment.bench.prompt_tokens", CONTEXTS[variant]),
        axis("slots", [1, 4, 16, 64]),
    )
