"""Reports: text for a terminal, and report.json and report.html for a directory."""

import contextlib
import tempfile
from pathlib import Path

from absl import logging

from qwen_jax.accuracy.report.as_json import to_json
from qwen_jax.accuracy.report.as_text import kept, text
from qwen_jax.accuracy.report.contents import Report, values
from qwen_jax.accuracy.report.page import to_html
from qwen_jax.errors import UserError
from qwen_jax.regular_files import why_not_written
from qwen_jax.reporting import page

NAMES = ("report.json", "report.txt", "report.html")

__all__ = ["Report", "prepare", "text", "to_html", "to_json", "values", "write"]


def prepare(workdir: str | Path) -> None:
    """Makes the directory, so that a long run need not end with one that can't be made.

    Raises:
        UserError: it can't be made or written, or holds a report.
    """
    for name in NAMES:
        if (Path(workdir) / name).exists():
            raise UserError(
                f"--workdir={workdir} holds a {name} already; move it, or choose another directory."
            )
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(
            f"{workdir}: the report can't be written: {why_not_written(error)}"
        ) from None


def write(workdir: str | Path, report: Report) -> tuple[Path, ...]:
    """Writes report.json, report.txt and report.html into a directory.

    Without matplotlib the last is left out, with a warning.

    Raises:
        UserError: the directory can't be written.
    """
    directory = Path(workdir)
    makers = {"report.json": to_json, "report.txt": kept}
    if page.can_be_made():
        makers["report.html"] = to_html
    else:
        logging.warning("report.html needs matplotlib: pip install 'qwen_jax[report]'.")
    paths = tuple(directory / name for name in makers)
    for path, make in zip(paths, makers.values(), strict=True):
        content = make(report)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            with contextlib.suppress(OSError):  # Half of a report is none.
                path.unlink()
            raise UserError(
                f"{path}: the report can't be written: {why_not_written(error)}"
            ) from None
    return paths
