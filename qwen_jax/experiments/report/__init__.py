"""What came out of one experiment, or of several side by side: a table, a CSV, a page."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from qwen_jax.experiments import records
from qwen_jax.experiments.lines import write_atomically
from qwen_jax.experiments.report.page import to_html
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.report.tables import csv_text, terminal_table
from qwen_jax.reporting import page
from qwen_jax.terminal import visible


def show(workdirs: Sequence[Path], out: Path, names: tuple[str, str] | None = None) -> Results:
    """Prints the table, and writes `results.csv` and, with matplotlib, `report.html` into `out`,
    which is made when there is something to write.

    Raises:
        UserError: a directory holds no experiment, several measure nothing in common, or `out`
            can't be written.
    """
    results = Results.read(workdirs)
    results.check_comparable()
    records.make(out)
    print(visible(terminal_table(results)))
    csv, html = names or ("results.csv", "report.html")
    replace(out / csv, csv_text(results))
    if not page.can_be_made():
        logging.warning("%s needs matplotlib: pip install 'qwen_jax[report]'.", html)
        return results
    replace(out / html, to_html(results))
    print(f"{os.path.relpath(out / html)}, {os.path.relpath(out / csv)}")
    return results


def replace(path: Path, text: str) -> None:
    """An older one goes, but not in silence."""
    if path.is_file() and path.read_bytes() != text.encode("utf-8", "backslashreplace"):
        print(f"{path} is replaced by a newer one", file=sys.stderr)
    write_atomically(path, text)
