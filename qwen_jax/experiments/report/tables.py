"""Results as text: a table for the terminal, a CSV for everything else."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from qwen_jax.experiments.declaration import clipped, one_line, short
from qwen_jax.experiments.report.results import Results, Row
from qwen_jax.reporting.table import Rounded, Table

STATES = {"ok": "finished", "failed": "failed", "missing": "not run yet"}
NO_POINTS = "No points."


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


def cells(results: Results, rows: Sequence[Row]) -> Table:
    """A header and a row a point: run, what is swept, state, and each metric that anything has."""
    several = len(results.names) > 1
    swept, metrics = results.swept, shown_metrics(results)
    header = [*(["run"] if several else []), *map(short, swept), *metrics]
    lines = []
    for row in rows:
        line = [row.run] if several else []
        line += [clipped(shown(row.overrides.get(field))) for field in swept]
        for index, name in enumerate(metrics):
            if name in row.metrics:
                value, error = row.metrics[name], row.metrics.get(f"{name}_error")
                full = f"{value!r}" if error is None else f"{value!r} ± {error!r}"
                line.append(Rounded.of(number(value, error), full))
            else:
                line.append(row.state if index == 0 and row.state != "ok" else "-")
        lines.append(line if metrics else [*line, row.state])
    header += [] if metrics else ["state"]
    return Table(header, lines, range(len(header)))


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
        return NO_POINTS
    table = cells(results, results.rows)
    given = (len(results.names) > 1) + len(results.swept)
    lines = table.blocks(given).split("\n")
    lines += [
        f"failed: {row.label}: {row.end['kind']}: {row.end['reason']}"
        for row in results.rows
        if row.state == "failed"
    ]
    return "\n".join([*lines, counted(results)])


def counted(results: Results) -> str:
    """How many points there are, and how they ended."""
    counts = {state: sum(row.state == state for row in results.rows) for state in STATES}
    ended = ", ".join(f"{n} {STATES[state]}" for state, n in counts.items() if n)
    return f"{ended}." if ended else NO_POINTS


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
