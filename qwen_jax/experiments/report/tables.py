"""Results as tables: a line a setting, or a line a point."""

import math
from collections.abc import Sequence
from typing import Any

from qwen_jax.experiments.answers.answer import value_of
from qwen_jax.experiments.declaration import clipped, one_line, short
from qwen_jax.experiments.report.results import Results, Row
from qwen_jax.reporting.table import Rounded, Table

STATES = {"ok": "finished", "failed": "failed", "skipped": "left out", "missing": "not run yet"}
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
    swept, metrics = results.swept, differing_metrics(results)
    header = [*(["run"] if several else []), *map(short, swept), *metrics]
    alone = {(s.run, s.points[0].id): s for s in results.settings if s.seeds == 1}
    lines = []
    for row in rows:
        line = [row.run] if several else []
        setting = alone.get((row.run, row.id))
        line += [clipped(shown(row.overrides.get(field))) for field in swept]
        for index, name in enumerate(metrics):
            if name in row.metrics:
                value, error = row.metrics[name], row.metrics.get(f"{name}_error")
                if error is None and setting is not None and (held := value_of(setting, name)):
                    error = held.mean.error  # over units, which a task of one's own may have
                full = f"{value!r}" if error is None else f"{value!r} ± {error!r}"
                line.append(Rounded.of(number(value, error), full))
            else:
                line.append(row.state if index == 0 and row.state != "ok" else "-")
        lines.append(line if metrics else [*line, row.state])
    header += [] if metrics else ["state"]
    return Table(header, lines, range(len(header)), alike(results))


def of_settings(results: Results) -> Table:
    """A header and a row a setting: what it sets, how many seeds it has, and the mean of each
    metric over prompts and seeds."""
    several = len(results.names) > 1
    settings, metrics = results.settings, differing_metrics(results)
    fields = list(settings[0].overrides) if settings else []
    header = [*(["run"] if several else []), *map(short, fields), "seeds", *metrics]
    lines = []
    for setting in settings:
        line = [setting.run] if several else []
        line += [clipped(shown(setting.overrides[field])) for field in fields]
        line.append(str(setting.seeds))
        for name in metrics:
            value = value_of(setting, name)
            if value is None:
                line.append("-")
                continue
            error = value.mean.error
            if error is None:
                error = setting.points[0].metrics.get(f"{name}_error")
            full = f"{value.mean.value!r}" if error is None else f"{value.mean.value!r} ± {error!r}"
            line.append(Rounded.of(number(value.mean.value, error), full))
        lines.append(line)
    return Table(header, lines, range(len(header)), alike(results))


def differing_metrics(results: Results) -> list[str]:
    """Those with a column of their own: all of a point alone, else those that differ between
    points; the one that the answer is about first."""
    ranked = [results.answer.metric] if results.answer else []
    names = [n for n in dict.fromkeys([*ranked, *results.metrics]) if n != "model_seconds"]
    if len(results.rows) == 1:
        return names
    return [name for name in names if len(_values(results, name)) > 1]


def alike(results: Results) -> str:
    """In words the metrics that say the same of all points, which need no column."""
    shown_already = {*differing_metrics(results), "model_seconds"}
    same = [name for name in results.metrics if name not in shown_already]
    said = ", ".join(f"{name} {number(_values(results, name).pop())}" for name in same)
    return f"The same everywhere: {said}." if said else ""


def _values(results: Results, name: str) -> set[float]:
    return {row.metrics[name] for row in results.rows if name in row.metrics}


def shown(value: Any) -> str:
    """A config value in a line."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else one_line(value)


def counted(results: Results) -> str:
    """How many points there are, and how they ended."""
    counts = {state: sum(row.state == state for row in results.rows) for state in STATES}
    ended = ", ".join(f"{n} {STATES[state]}" for state, n in counts.items() if n)
    return f"{ended}." if ended else NO_POINTS
