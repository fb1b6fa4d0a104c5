"""Sampling settings against diversity: eight samples of each of 40 prompts.

    python run.py experiment --config=configs/experiments/sampling_diversity.py \\
        --workdir=runs/sampling_diversity

Needs nothing but the package; 18 points, three minutes on two CPU cores. Expect different texts to
grow with temperature, top-p 0.9 and min-p 0.1 to take back some of it, and the share of good haiku
to fall least under min-p, which bounds how unlikely a token may be whatever the temperature.
"""

from ml_collections import ConfigDict

from qwen_jax.experiments import Sweep, axis, chain, product
from qwen_jax.settings import get_config as defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.prompt_file = "configs/experiments/words.jsonl"
    config.experiment.template = "haiku: {word}"
    config.experiment.scores = ("haiku", "diversity")
    config.answer.metric = "haiku"
    config.max_tokens = 64
    config.n = 8
    config.slots = 64
    return config


def get_sweep() -> Sweep:
    return product(
        axis("sampling.temperature", [0.4, 0.7, 1.0, 1.3, 1.6, 2.0]),
        chain(
            [{"sampling.top_p": 1.0, "sampling.min_p": 0.0}],
            [{"sampling.top_p": 0.9, "sampling.min_p": 0.0}],
            [{"sampling.top_p": 1.0, "sampling.min_p": 0.1}],
        ),
    )
