"""`run.py report`: the results of an experiment, or of several side by side."""

import os
from pathlib import Path

from qwen_jax import regular_files
from qwen_jax.errors import UserError
from qwen_jax.experiments import merge, report
from qwen_jax.settings import Command


def run(command: Command) -> int:
    """Prints the table and writes the page: into the workdir, or between several of them."""
    paths = [Path(argument) for argument in command.arguments]
    if not paths:
        raise UserError("There is nothing to report on; name a workdir, as in report runs/a.")
    merge.refuse_named_twice(paths)
    out, names = paths[0], None
    if len(paths) > 1:
        # Beside the experiments, under a name that says which they are.
        out = Path(os.path.commonpath([regular_files.resolved(path).parent for path in paths]))
        stem = "+".join(regular_files.resolved(path).name for path in paths)
        names = (f"{stem}.csv", f"{stem}.html")
    if command.config.workdir is not None:
        out = Path(command.config.workdir)
    report.show(paths, out, names)
    return 0
