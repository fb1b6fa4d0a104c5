"""A task of lm-evaluation-harness, made from a local file, against quantisation.

    pip install '.[eval]'
    python run.py experiment --config=configs/experiments/evaluation.py --workdir=runs/evaluation

Five points, a minute on two CPU cores. Each line of tasks/haiku_word.jsonl asks for a haiku on
a word and offers two that differ in that word alone; the model should find the one with the word
more likely. Expect an accuracy of about 0.9 down to Q3_K, and at most a coin's for the ternary one.
Tasks that the harness knows, such as arc_easy, go the same way with
--config.experiment.eval.tasks=arc_easy, and need a download. Chat models want
--config.experiment.eval.apply_chat_template, and perhaps --system; tasks that write answers follow
--max_tokens, --stop and sampling, where they are given, instead of their own settings.
"""

from ml_collections import ConfigDict

from qwen_jax.experiments import Sweep, axis
from qwen_jax.settings import get_config as defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.experiment.task = "eval"
    config.experiment.eval.tasks = ("haiku_word",)
    config.experiment.eval.include = "configs/experiments/tasks"
    return config


def get_sweep() -> Sweep:
    return axis("experiment.quantization", ["Q8_0", "Q4_0", "Q3_K", "Q2_K", "TQ2_0"])
