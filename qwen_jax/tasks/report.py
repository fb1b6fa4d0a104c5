"""`run.py report`: the results of an experiment, or of several side by side; reports of `compare`
side by side."""

import os
from collections.abc import Sequence
from pathlib import Path

from qwen_jax import regular_files
from qwen_jax.errors import UserError
from qwen_jax.experiments import merge, records, report
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.settings import Command
from qwen_jax.terminal import visible


def run(command: Command) -> int:
    """Prints the table and writes the page: into the workdir, or between several of them."""
    paths = [Path(argument) for argument in command.arguments]
    if not paths:
        raise UserError("There is nothing to report on; name a workdir, as in report runs/a.")
    merge.refuse_named_twice(paths)
    out, stem = paths[0], None
    if len(paths) > 1:
        # Beside the experiments, under a name that says which they are.
        out = Path(os.path.commonpath([regular_files.resolved(path).parent for path in paths]))
        stem = "+".join(regular_files.resolved(path).name for path in paths)
    if command.config.workdir is not None:
        out = Path(command.config.workdir)
    if any(map(_is_of_compare, paths)):
        _lay_beside(paths, out)
    else:
        report.show(paths, out, stem, asked=Asked.of(command.config.answer))
    return 0


def _is_of_compare(directory: Path) -> bool:
    """An experiment has no such file."""
    try:
        return (directory / "report.json").is_file()
    except OSError:  # of a name that is too long, which is told when it is read
        return False


def _lay_beside(paths: Sequence[Path], out: Path) -> None:
    """Reports of `compare`: what is not the same in all of them."""
    from qwen_jax.accuracy.report import beside  # the laboratory, which experiments can do without

    if len(paths) == 1:
        raise UserError(
            f"{paths[0]} is a report of compare, and says for itself what it found; name another "
            "one to lay beside it."
        )
    for path in paths:
        if not _is_of_compare(path):
            raise UserError(
                f"{path} holds no report.json, as the others do; report lays reports of compare "
                "side by side, or experiments."
            )
    names = [regular_files.resolved(path).name for path in paths]
    if len(set(names)) < len(names):
        names = list(map(str, paths))
    saved = [beside.Saved.read(path, name) for path, name in zip(paths, names, strict=True)]
    print(visible(beside.text(saved)))
    page = out / f"{'+'.join(regular_files.resolved(path).name for path in paths)}.html"
    records.make(out)
    report.replace(page, beside.to_html(saved))
    print(os.path.relpath(page))
