"""Quantisation against quality: the bundled model in every type that can be written.

    python run.py experiment --config=configs/experiments/quantization.py \
        --workdir=runs/quantization

Needs nothing but the package; 17 points, about a minute on two CPU cores. Each type is made
from the bundled model (whose own weights are Q8_0) and compared with it over its sample text.
Expect KL divergence to grow with every bit that goes: nothing at Q8_0, about 0.002 nats at Q6_K
and four times more for each bit less down to Q4_0, and gibberish for the ternary types, which
suit models trained for them. K-quants are rounded to the nearest here; llama.cpp's search makes
them somewhat better.

    --config=configs/experiments/quantization.py:0.5b --model=F16.gguf \
        --config.experiment.text=wiki.test.raw

does the same with a model of yours, in bfloat16.
"""

from ml_collections import ConfigDict

from qwen_jax.experiments import Sweep, axis
from qwen_jax.settings import get_config as defaults
from qwen_jax.weights.encoding import TYPES


def get_config(variant: str = "") -> ConfigDict:
    """The config; `variant` is "" or "0.5b"."""
    if variant not in ("", "0.5b"):
        raise ValueError(f"quantization.py has no variant {variant!r}, only '0.5b'")
    config = defaults()
    config.experiment.task = "compare"
    config.experiment.reference.quantization = "F32"
    config.experiment.context = 256
    if variant == "0.5b":
        config.dtype = "bfloat16"
        config.experiment.context = 512
    return config


def get_sweep() -> Sweep:
    return axis("experiment.quantization", TYPES)
