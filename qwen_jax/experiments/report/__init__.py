"""What came out of one experiment, or of several side by side: a table, a CSV, a page."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from qwen_jax.experiments import records
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.experiments.lines import write_atomically
from qwen_jax.experiments.report.page import to_html
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.report.text import csv_text, json_text, terminal_text
from qwen_jax.reporting import page
from qwen_jax.terminal import visible


def show(
    workdirs: Sequence[Path], out: Path, stem: str | None = None, *, asked: Asked | None = None
) -> Results:
    """Prints the answer and the table, and writes `results.csv`, `results.json` and, with
    matplotlib, `report.html` into `out`, which is made when there is something to write.

    Args:
        stem: of the files' names instead of these.
        asked: what the answer is to be about, if not what the experiments say.

    Raises:
        UserError: a directory holds no experiment, several measure nothing in common, there is
            no such metric or baseline as is asked for, or `out` can't be written.
    """
    results = Results.read(workdirs, asked)
    results.check_comparable()
    text = terminal_text(results)
    records.make(out)
    print(visible(text))
    csv, json, html = (
        f"{stem or name}.{suffix}"
        for name, suffix in (("results", "csv"), ("results", "json"), ("report", "html"))
    )
    replace(out / csv, csv_text(results))
    replace(out / json, json_text(results))
    made = [csv, json]
    if page.can_be_made():
        for name, content in to_html(results, html.removesuffix(".html")).items():
            replace(out / name, content)
        made = [html, *made]
    else:
        logging.warning("%s needs matplotlib: pip install 'qwen_jax[report]'.", html)
    print(", ".join(visible(os.path.relpath(out / name)) for name in made))
    return results


def replace(path: Path, text: str) -> None:
    """An older one goes, but not in silence."""
    if path.is_file() and path.read_bytes() != text.encode("utf-8", "backslashreplace"):
        print(f"{path} is replaced by a newer one", file=sys.stderr)
    write_atomically(path, text)
