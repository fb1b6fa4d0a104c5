"""What came out of one experiment, or of several side by side: a table, a CSV, a page."""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from qwen_jax.experiments.lines import write_atomically
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.report.tables import csv_text, terminal_table


def show(workdirs: Sequence[Path], out: Path, names: tuple[str, str] | None = None) -> Results:
    """Prints the table, and writes `results.csv` and, with matplotlib, `report.html` into `out`.

    Raises:
        UserError: a directory holds no experiment.
    """
    results = Results.read(workdirs)
    print(terminal_table(results))
    csv, page = names or ("results.csv", "report.html")
    write_atomically(out / csv, csv_text(results))
    try:
        from qwen_jax.experiments.report.page import html
    except ImportError:
        logging.warning("%s needs matplotlib: pip install 'qwen_jax[report]'.", page)
        return results
    write_atomically(out / page, html(results))
    print(f"{os.path.relpath(out / page)}, {os.path.relpath(out / csv)}")
    return results
