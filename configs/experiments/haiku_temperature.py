"""Haiku of the bundled model against temperature.

    python run.py experiment --config=configs/experiments/haiku_temperature.py \\
        --workdir=runs/haiku_temperature

Needs nothing but the package; 21 points, half a minute on two CPU cores. Asks for haiku on 40
words that training never saw, seven temperatures and three seeds each. Expect nearly all haiku to
be good up to temperature 0.6, and fewer and fewer from 1.0 on: the asked word goes first.
"""

from ml_collections import ConfigDict

from qwen_jax.experiments import Sweep, axis, product
from qwen_jax.settings import get_config as defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.prompt_file = "configs/experiments/words.jsonl"
    config.experiment.template = "Write a haiku that contains the word {word}."
    config.experiment.scores = ("haiku",)
    config.answer.metric = "haiku"
    config.max_tokens = 96
    config.slots = 40
    return config


def get_sweep() -> Sweep:
    return product(
        axis("sampling.temperature", [0.0, 0.3, 0.6, 0.8, 1.0, 1.3, 1.6]),
        axis("sampling.seed", [0, 1000, 2000]),
    )
