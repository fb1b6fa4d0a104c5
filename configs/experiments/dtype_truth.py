"""Dtype, precision and implementation against the truth: NumPy in float64.

    python run.py experiment --config=configs/experiments/dtype_truth.py --workdir=runs/dtype_truth

Needs nothing but the package; 5 points, a minute or two on two CPU cores, most of it the
truth's. Expect KL divergences of some 1e-10 nats in float32, which is the rounding of what is
compared, 1e-6 in float16 and 2e-4 in bfloat16: it has three bits less, so errors are 8 times as
large, and KL divergence goes with their square. On a CPU the matmul precisions agree: it has no
TF32.
"""

from ml_collections import ConfigDict

from qwen_jax.experiments import Sweep, axis, chain, product
from qwen_jax.settings import get_config as defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.experiment.task = "compare"
    config.experiment.reference.dtype = "float64"
    config.experiment.context = 256
    return config


def get_sweep() -> Sweep:
    return chain(
        product(
            axis("dtype", ["float32"]), axis("matmul_precision", ["highest", "high", "default"])
        ),
        product(axis("dtype", ["float16", "bfloat16"]), axis("matmul_precision", ["highest"])),
    )
