"""What users wait for, against how many ask at a time.

    python run.py experiment --config=configs/experiments/load.py --workdir=runs/load
    python run.py experiment --config=configs/experiments/load.py:rate --workdir=runs/load-rate

Needs nothing but the package; 5 points of 5 repeats, two minutes on two CPU cores. Of 64 requests
for a haiku, so many are under way at a time; `load.py:rate` has them arrive by themselves, 2 to 32
a second. Expect more tokens/s and a longer time per token with more slots, and a time to first
token that grows without bound once more arrive than can be answered. A request is good if its first
text comes within a second and each token after it within 50 ms.
"""

from ml_collections import ConfigDict

from qwen_jax.experiments import Sweep, axis, zipped
from qwen_jax.settings import get_config as defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; `variant` is "" or "rate"."""
    if variant not in ("", "rate"):
        raise ValueError(f"load.py has no variant {variant!r}, only 'rate'")
    config = defaults()
    config.experiment.task = "serve"
    config.prompt_file = "configs/experiments/words.jsonl"
    config.experiment.template = "haiku: {word}"
    config.experiment.serve.good_tpot_ms = 50.0
    config.experiment.serve.repeats = 5
    config.max_tokens = 64
    if variant == "rate":
        config.slots = 8
    return config


def get_sweep(variant: str = "") -> Sweep:
    if variant == "rate":
        return axis("experiment.serve.rate", [2.0, 4.0, 8.0, 16.0, 32.0])
    sizes = [1, 2, 4, 8, 16]
    return zipped(axis("slots", sizes), axis("experiment.serve.concurrency", sizes))
