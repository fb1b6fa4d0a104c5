"""`run.py recorder`: the scripts that record another engine's tensors, listed or printed."""

import sys

from qwen_jax import recorders
from qwen_jax.errors import UserError
from qwen_jax.settings import Command, program


def run(command: Command) -> int:
    """Prints a line for each, or the one that is named; returns the exit code."""
    if len(command.arguments) > 1:
        raise UserError(f"recorder takes one name, but got {' '.join(command.arguments):.60}.")
    for name in command.arguments:
        print(recorders.source(name), end="")
        return 0
    width = max(map(len, recorders.names()))
    for name in recorders.names():
        print(f"{name:<{width}}  {recorders.title(name)}")
    print(f"{program()} recorder NAME > record_NAME.py gives one to copy.", file=sys.stderr)
    return 0
