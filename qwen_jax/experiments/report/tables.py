"""Results as text: a table for the terminal, a CSV for everything else."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

from qwen_jax.experiments.declaration import clipped, one_line, short
from qwen_jax.experiments.report.results import Results, Row

WIDTH = 100
"""Columns of the terminal's table, at most."""


def number(value: float, error: float | None = None) -> str:
    """Four digits that mean something; with an error, as many as its first two have."""
    if error is not None and error > 0 and math.isfinite(error):
        places = max(0, 1 - math.floor(math.log10(error)))
        if places <= 6:
            return f"{value:,.{places}f} ± {error:,.{places}f}"
        return f"{value:.3g} ± {error:.1g}"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def cells(results: Results, rows: Sequence[Row]) -> list[list[str]]:
    """A header and a row a point: run, what is swept, state, and each metric that anything has."""
    several = len(results.names) > 1
    swept, metrics = results.swept, shown_metrics(results)
    table = [[*(["run"] if several else []), *map(short, swept), *metrics]]
    for row in rows:
        line = [row.run] if several else []
        line += [clipped(shown(row.overrides.get(field))) for field in swept]
        for index, name in enumerate(metrics):
            if name in row.metrics:
                line.append(number(row.metrics[name], row.metrics.get(f"{name}_error")))
            else:
                line.append(row.state if index == 0 and row.state != "ok" else "-")
        table.append(line if metrics else [*line, row.state])
    if not metrics:
        table[0].append("state")
    return table


def shown_metrics(results: Results) -> list[str]:
    """Metrics that differ between points; how long things took comes last."""
    return sorted(
        (name for name in results.metrics if name != "model_seconds"),
        key=lambda name: len({row.metrics.get(name) for row in results.rows}) == 1,
    )


def shown(value: Any) -> str:
    """A config value in a line."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else one_line(value)


def terminal_table(results: Results) -> str:
    """The table, in pieces that fit, a line on what failed, and how many points there are."""
    if not results.rows:
        return "No points."
    table = cells(results, results.rows)
    given = (len(results.names) > 1) + len(results.swept)
    lines = "\n\n".join(_blocks(table, given)).split("\n")
    lines += [
        f"failed: {row.label}: {row.end['kind']}: {row.end['reason']}"
        for row in results.rows
        if row.state == "failed"
    ]
    counts = {state: sum(row.state == state for row in results.rows) for state in STATES}
    lines.append(", ".join(f"{n} {STATES[state]}" for state, n in counts.items() if n) + ".")
    return "\n".join(lines)


def _blocks(table: list[list[str]], given: int) -> Iterator[str]:
    """The table, cut into as many as it takes for each to fit.

    All have the columns that say which point it is, the first ones; where these leave too little
    room, they are tables of their own, and the point's number stands for them.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    named, left = list(range(given)), list(range(given, len(widths)))
    if sum(widths) + 2 * (len(widths) - 1) > WIDTH < 2 * sum(widths[i] + 2 for i in named):
        numbers = ["#", *map(str, range(1, len(table)))]
        table = [[number, *line] for number, line in zip(numbers, table, strict=True)]
        widths = [len(numbers[-1]), *widths]
        named, left = [0], list(range(1, len(widths)))
    while left:
        columns = [*named, left.pop(0)]
        while left and sum(widths[i] + 2 for i in (*columns, left[0])) - 2 <= WIDTH:
            columns.append(left.pop(0))
        lines = ["  ".join(f"{line[i]:>{widths[i]}}" for i in columns) for line in table]
        yield "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


STATES = {"ok": "finished", "failed": "failed", "missing": "not run yet"}


def csv_text(results: Results) -> str:
    """Every point with every override and metric, unrounded."""
    fields = list(dict.fromkeys(f for row in results.rows for f in row.overrides))
    metrics = list(dict.fromkeys(m for row in results.rows for m in row.metrics))
    end = ["seconds", "compile_seconds", "peak_bytes", "kind", "reason"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "point", "state", *fields, *metrics, *end])
    for row in results.rows:
        writer.writerow(
            [
                *(row.run, row.id, row.state),
                *(row.overrides.get(field) for field in fields),
                *(row.metrics.get(metric) for metric in metrics),
                *(row.end.get(name) for name in end),
            ]
        )
    return out.getvalue()
