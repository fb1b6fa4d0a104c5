"""Quantisation against what it does to the model's distribution, and to its score on a task.

    python run.py experiment --config=configs/experiments/quantization_score.py \\
        --workdir=runs/quantization_score

Needs nothing but the package; 8 points, two minutes on two CPU cores. Each type is compared with
F32 over the bundled model's sample text, and writes haiku on 40 words that training never saw. The
shape is that of published comparisons (Dutta et al., Accuracy is Not All You Need, 2024,
arXiv:2407.09141; llama.cpp's tables of its K-quants): KL divergence tells each type from the next
from the first bit that goes, and a task's score sees nothing of it until much is broken. Expect the
share of good haiku to be told from Q8_0's at Q2_K or not even there, and nothing to be left at
TQ2_0.
"""

from ml_collections import ConfigDict

from qwen_jax.experiments import Sweep, axis
from qwen_jax.settings import get_config as defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.experiment.task = "compare+generate"
    config.experiment.reference.quantization = "F32"
    config.experiment.context = 256
    config.prompt_file = "configs/experiments/words.jsonl"
    config.experiment.template = "Write a haiku that contains the word {word}."
    config.experiment.scores = ("haiku",)
    config.answer.metric = "haiku"
    config.answer.baseline = "quantization=Q8_0"
    config.max_tokens = 96
    config.slots = 40
    return config


def get_sweep() -> Sweep:
    types = ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K", "TQ2_0"]
    return axis("experiment.quantization", types)
