"""Pictures of results: metrics against what was swept, speed, and the Pareto front.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; lines differ in their
markers, too.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from qwen_jax.experiments.declaration import short
from qwen_jax.experiments.report.results import Results, Row
from qwen_jax.experiments.report.tables import shown, shown_metrics

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = "osD^vPX"
SEED = "sampling.seed"
LABELS = {
    "kld": "KL divergence (nats)",
    "kld_p99": "KL divergence, 99th percentile (nats)",
    "kld_max": "largest KL divergence (nats)",
    "same_top": "same likeliest token (share)",
    "haiku": "good haiku (share)",
    "tokens_per_s": "generation (tokens/s)",
    "prefill_tokens_per_s": "prefill (tokens/s)",
    "decode_tokens_per_s": "decoding (tokens/s)",
    "ms_per_step": "decode step (ms)",
    "distinct_1": "different words (share)",
    "distinct_2": "different word pairs (share)",
    "different_texts": "different texts (share)",
}
NOT_PLOTTED = (
    "weight_bytes",
    "device_bytes",
    "prompts",
    "scored_tokens",
    "windows",
    "prompt_tokens_per_s",
    "model_seconds",
)
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "svg.fonttype": "path",
    "legend.frameon": False,
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure, and a sentence that says how to read it."""

    name: str
    figure: Figure
    caption: str


def pictures(results: Results) -> Iterator[Picture]:
    """All that the results can show."""
    with mpl.rc_context(STYLE):
        yield from _against_axes(results)
        front = _pareto(results)
        if front is not None:
            yield front


def _against_axes(results: Results) -> Iterator[Picture]:
    """One figure an axis, one panel a metric; other axes are lines, seeds are error bars."""
    swept = [field for field in results.swept if field != SEED]
    metrics = [
        name
        for name in shown_metrics(results)
        if name not in NOT_PLOTTED and len({r.metrics.get(name) for r in results.rows} - {None}) > 1
    ]
    for axis in swept:
        others = [field for field in swept if field != axis]
        lines = _lines(results, axis, others)
        if not metrics or not any(len(points) > 1 for points in lines.values()):
            continue
        columns = min(3, len(metrics))
        rows = -(-len(metrics) // columns)
        figure = Figure(figsize=(3.7 * columns, 2.9 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, metric in zip(panels, metrics, strict=False):
            _draw(panel, lines, axis, metric)
        for panel in panels[len(metrics) :]:
            panel.set_visible(False)
        if len(lines) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(lines)))
        seeds = len({row.overrides.get(SEED) for row in results.rows})
        bars = f"{seeds} seeds (one standard deviation)" if seeds > 1 else "the metric's own error"
        caption = f"Each metric against {short(axis)}; bars are {bars}."
        yield Picture(f"by-{short(axis)}", figure, caption)


Lines = dict[tuple[str, ...], dict[Any, list[Row]]]


def _lines(results: Results, axis: str, others: Sequence[str]) -> Lines:
    """Finished rows by line (run and other axes) and by value of the axis."""
    lines: Lines = {}
    for row in results.rows:
        if row.state != "ok":
            continue
        key = [row.run] if len(results.names) > 1 else []
        key += [f"{short(o)} {shown(row.overrides.get(o))}" for o in others]
        lines.setdefault(tuple(key), {}).setdefault(row.overrides.get(axis), []).append(row)
    return lines


def _draw(panel: Axes, lines: Lines, axis: str, metric: str) -> None:
    values = list(dict.fromkeys(value for points in lines.values() for value in points))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    for number, (key, points) in enumerate(lines.items()):
        there = [
            (value, found)
            for value, rows in points.items()
            if (found := [row for row in rows if metric in row.metrics])
        ]
        if not there:
            continue
        if numeric:
            there.sort(key=lambda pair: pair[0])
        xs = [value if numeric else values.index(value) for value, _ in there]
        ys, errors = zip(*(_mean(rows, metric) for _, rows in there), strict=True)
        panel.errorbar(
            xs,
            ys,
            yerr=errors if any(errors) else None,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            # Between names there is nothing for a line to pass through.
            linestyle="-" if numeric else "none",
            linewidth=1.5,
            capsize=3,
            label=", ".join(key),
        )
    panel.set_title(LABELS.get(metric, metric.replace("_", " ")), loc="left", fontsize=10)
    panel.set_xlabel(short(axis).replace("_", " "))
    _scale(panel, values, numeric)


def _scale(panel: Axes, values: Sequence[Any], numeric: bool) -> None:
    """Powers of two stand evenly; names stand below their points; small ranges keep zero out."""
    if not numeric:
        panel.set_xticks(range(len(values)), [shown(value) for value in values])
        if max(len(shown(value)) for value in values) * len(values) > 30:
            panel.tick_params(axis="x", labelrotation=60)
        panel.margins(x=0.08)
    elif len(values) > 1 and min(values) > 0 and max(values) >= 8 * min(values):
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(values), [shown(value) for value in sorted(values)])
        panel.xaxis.set_minor_locator(NullLocator())
    low, high = panel.dataLim.intervaly
    if low > 0 and high > 30 * low:
        panel.set_yscale("log")
    elif low >= 0 and low < 0.5 * high:
        panel.set_ylim(bottom=0)


def _mean(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """The mean, and the deviation over seeds or, of a single row, its own error."""
    values = [row.metrics[metric] for row in rows]
    if len(values) > 1:
        return statistics.fmean(values), statistics.stdev(values)
    return values[0], rows[0].metrics.get(f"{metric}_error", 0.0)


def _pareto(results: Results) -> Picture | None:
    """KL divergence against speed and memory, with the points that nothing beats in both."""
    rows = [row for row in results.rows if row.metrics.get("kld", 0) > 0]
    costs = {
        "weight_bytes": ("size of the weights in the file (MB)", 1e6, False),
        "device_bytes": ("weights on the device (MB)", 1e6, False),
        "tokens_per_s": ("generation (tokens/s)", 1.0, True),
        "decode_tokens_per_s": ("decoding (tokens/s)", 1.0, True),
    }
    costs = {n: c for n, c in costs.items() if len({r.metrics.get(n) for r in rows}) > 1}
    if len(rows) < 3 or not costs:
        return None
    figure = Figure(figsize=(6.4 * len(costs), 4.4), layout="constrained")
    panels = figure.subplots(1, len(costs), squeeze=False).ravel()
    for panel, (name, (title, unit, more_is_better)) in zip(panels, costs.items(), strict=True):
        points = [(r.metrics[name] / unit, r.metrics["kld"], _name(results, r)) for r in rows]
        best = _front(points, more_is_better)
        panel.plot(*zip(*best, strict=True), color="#bbbbbb", linewidth=1.5, zorder=1)
        for x, y, label in points:
            on = (x, y) in best
            panel.plot(x, y, "o", color=COLOURS[0] if on else "#999999", markersize=6)
            panel.annotate(
                label, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8,
                color="black" if on else "#777777",
            )  # fmt: skip
        panel.set_yscale("log")
        panel.set_xlabel(title)
        panel.set_ylabel(LABELS["kld"])
        panel.margins(x=0.12, y=0.08)
    better = "Lower is better; blue points are those that no other beats in both."
    return Picture("pareto", figure, better)


def _front(points: Sequence[tuple[float, float, str]], more: bool) -> list[tuple[float, float]]:
    """The points for which no other has both a better x and a lower y, from left to right."""
    best: list[tuple[float, float]] = []
    for x, y, _ in sorted(points, key=lambda p: (-p[0] if more else p[0], p[1])):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return sorted(best)


def _name(results: Results, row: Row) -> str:
    values = [shown(row.overrides[f]) for f in results.swept if row.overrides.get(f) is not None]
    return " ".join([*([row.run] if len(results.names) > 1 else []), *values]) or row.run
