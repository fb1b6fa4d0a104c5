"""`run.py score`: an experiment's answers judged again, from its records."""

import sys
from pathlib import Path

from qwen_jax.errors import UserError
from qwen_jax.experiments import report, rescoring
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.settings import Command


def run(command: Command) -> int:
    """Judges the answers in the workdirs named, and shows each as `report` does."""
    paths = [Path(argument) for argument in command.arguments]
    if not paths:
        raise UserError("There is nothing to score; name a workdir, as in score runs/a.")
    if "" not in sys.path:
        sys.path.append("")  # The working directory, where scores of one's own may be.
    asked = Asked.of(command.config.answer)
    for path in paths:
        rescoring.rescore(path, command.config.experiment.scores)
        report.show([path], path, asked=asked)
    return 0
