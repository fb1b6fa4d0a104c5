"""`run.py configs`: the ready-made configs, by the names that --config takes."""

import sys

from qwen_jax import ready_made
from qwen_jax.settings import Command, program


def run(command: Command) -> int:
    """Prints a line for each; returns the exit code."""
    print(*ready_made.listed(), sep="\n")
    print(f"{program()} --config=NAME takes one of {ready_made.HOME}.", file=sys.stderr)
    return 0
