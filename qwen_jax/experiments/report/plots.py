"""Pictures of results: metrics against what was swept, speed, and the Pareto front."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator

from qwen_jax.experiments.declaration import clipped, short
from qwen_jax.experiments.report.results import Results, Row
from qwen_jax.experiments.report.tables import differing_metrics, number, shown
from qwen_jax.reporting.drawing import Drawing
from qwen_jax.reporting.page import Picture
from qwen_jax.reporting.style import BLUE, GRID, INK, MUTED, PALE, literal, series

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


def pictures(results: Results) -> Iterator[Picture]:
    """All that the results can show; draw within `page.drawing`."""
    yield from _against_axes(results)
    front = _pareto(results)
    if front is not None:
        yield front


def _against_axes(results: Results) -> Iterator[Picture]:
    """One figure an axis, one panel a metric; other axes are lines, seeds are error bars."""
    swept = [f for f in results.swept if f != SEED and _swept_within_a_run(results, f)]
    metrics = [
        name
        for name in differing_metrics(results)
        if name not in NOT_PLOTTED and len({r.metrics.get(name) for r in results.rows} - {None}) > 1
    ]
    for axis in swept:
        others = [field for field in swept if field != axis]
        lines = _lines(results, axis, others)
        # Where lines meet the axis more than once, single points beside them show no trend.
        lines = {key: points for key, points in lines.items() if len(points) > 1}
        rows_drawn = [row for line in lines.values() for at in line.values() for row in at]
        present = [name for name in metrics if any(name in row.metrics for row in rows_drawn)]
        if not present:
            continue
        columns = min(3, len(present))
        rows = -(-len(present) // columns)
        # Names go down the side, and want a line each.
        names = 0 if _numeric(results, axis) else len({r.overrides.get(axis) for r in results.rows})
        height = max(2.9, 0.22 * names + 1)
        figure = Drawing(height * rows + 0.5, 3.7 * columns)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, metric in zip(panels, present, strict=False):
            _draw(figure, panel, lines, axis, metric)
        for panel in panels[len(present) :]:
            panel.set_visible(False)
        if len(lines) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            # A legend of 10 point letters: some 12 of them an inch, and a line before each.
            fitting = int(12 * figure.get_figwidth() / (max(map(len, labels)) + 7))
            fitting = max(1, min(fitting, len(lines)))
            figure.legend(handles, labels, loc="outside lower center", ncols=fitting)
        seeds = len({row.overrides.get(SEED) for row in results.rows})
        bars = f"{seeds} seeds (one standard deviation)" if seeds > 1 else "the metric's own error"
        yield Picture(f"By {short(axis)}", f"Bars are {bars}.", figure)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numeric(results: Results, axis: str) -> bool:
    return all(_is_number(row.overrides.get(axis)) for row in results.rows)


def _swept_within_a_run(results: Results, field: str) -> bool:
    """Other fields differ between runs alone, whose names say so already."""
    values: dict[str, set[Any]] = {}
    for row in results.rows:
        values.setdefault(row.run, set()).add(row.overrides.get(field))
    return any(len(seen) > 1 for seen in values.values())


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


def _draw(figure: Drawing, panel: Axes, lines: Lines, axis: str, metric: str) -> None:
    """Numbers go along the bottom; names down the side, where they can be read."""
    values = list(dict.fromkeys(value for points in lines.values() for value in points))
    numeric = all(map(_is_number, values))
    seen: list[float] = []
    for index, (key, points) in enumerate(lines.items()):
        there = [
            (value, found)
            for value, rows in points.items()
            if (found := [row for row in rows if metric in row.metrics])
        ]
        if not there:
            continue
        if numeric:
            there.sort(key=lambda pair: pair[0])
        at = [value if numeric else values.index(value) for value, _ in there]
        means, errors = zip(*(_mean(rows, metric) for _, rows in there), strict=True)
        seen += means
        bars = errors if any(errors) else None
        look = series(index)
        if not numeric:  # Between names there is nothing for a line to pass through.
            look["linestyle"] = "none"
        panel.errorbar(
            at if numeric else means,
            means if numeric else at,
            yerr=bars if numeric else None,
            xerr=None if numeric else bars,
            markersize=5,
            linewidth=1.5,
            capsize=3,
            label=literal(", ".join(map(clipped, key))),
            **look,  # type: ignore[arg-type]
        )
        for (value, _), where, mean, error in zip(there, at, means, errors, strict=True):
            x, y = (where, mean) if numeric else (mean, where)
            of = ", ".join([*map(clipped, key), f"{short(axis)} {clipped(shown(value))}"])
            figure.point(panel, x, y, f"{of}: {metric} {number(mean, error)}")
    panel.grid(True)
    panel.set_title(LABELS.get(metric, metric.replace("_", " ")), loc="left", fontsize=10)
    if numeric:
        panel.set_xlabel(short(axis).replace("_", " "))
        _scale_axis(panel, values)
    else:
        panel.set_yticks(range(len(values)), [literal(clipped(shown(value))) for value in values])
        panel.set_ylim(len(values) - 0.5, -0.5)
    _scale_metric(panel, seen, "y" if numeric else "x")


def _scale_axis(panel: Axes, values: Sequence[Any]) -> None:
    """Powers of two stand evenly."""
    if len(values) > 2 and min(values) > 0 and max(values) >= 8 * min(values):
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(values), [shown(value) for value in sorted(values)])
        panel.xaxis.set_minor_locator(NullLocator())


def _scale_metric(panel: Axes, seen: Sequence[float], side: str) -> None:
    """A share shows all from 0 to 1; several powers of ten stand evenly."""
    low, high = min(seen), max(seen)
    upright = side == "y"
    set_limits = panel.set_ylim if upright else panel.set_xlim
    ticks = panel.yaxis if upright else panel.xaxis
    if 0 <= low < 0.9 and 0.5 < high <= 1:
        set_limits(-0.03, 1.03)
    elif (smallest := _smallest(seen)) and high > (30 if low > 0 else 1000) * smallest:
        _set_logarithmic(panel, side, seen)
        if low > 0 and high < 1000 * low:  # 20 and not 2 x 10^1
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_formatter(NullFormatter())
        return
    elif 0 <= low < 0.5 * high:
        set_limits(0)
    ticks.set_major_formatter("{x:g}")
    if not upright:
        ticks.set_major_locator(MaxNLocator(4))


def _smallest(values: Sequence[float]) -> float | None:
    """The least value that is more than rounding, which may leave less than 0 of nothing."""
    noise = max(0.0, -min(values))
    return min((value for value in values if value > 10 * noise), default=None)


def _set_logarithmic(panel: Axes, side: str, values: Sequence[float]) -> None:
    """Powers of ten stand evenly; there is a 0 for what is at or below it."""
    upright, smallest, high = side == "y", _smallest(values), max(values)
    set_scale = panel.set_yscale if upright else panel.set_xscale
    if min(values) > 0:
        set_scale("log")
    elif smallest is not None:
        first, last = (math.floor(math.log10(value)) for value in (smallest, high))
        set_scale("symlog", linthresh=10.0**first, linscale=0.5)
        (panel.set_ylim if upright else panel.set_xlim)(-(10.0**first) / 2, 4 * high)
        step = max(1, (last - first) // (6 if upright else 3))
        powers = [10.0**power for power in range(last, first, -step)]
        (panel.yaxis if upright else panel.xaxis).set_ticks([0.0, *powers])


def _mean(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """The mean, and the deviation over seeds or, of a single row, its own error."""
    values = [row.metrics[metric] for row in rows]
    if len(values) > 1:
        return statistics.fmean(values), statistics.stdev(values)
    return values[0], rows[0].metrics.get(f"{metric}_error", 0.0)


def _pareto(results: Results) -> Picture | None:
    """KL divergence against speed and memory, with the points that nothing beats in both."""
    rows = [row for row in results.rows if "kld" in row.metrics]
    costs = {
        "weight_bytes": ("size of the weights in the file (MB)", 1e6, False),
        "device_bytes": ("weights on the device (MB)", 1e6, False),
        "tokens_per_s": ("generation (tokens/s)", 1.0, True),
        "decode_tokens_per_s": ("decoding (tokens/s)", 1.0, True),
    }
    having = {name: [row for row in rows if name in row.metrics] for name in costs}
    costs = {
        name: cost
        for name, cost in costs.items()
        if len(having[name]) > 2 and len({row.metrics[name] for row in having[name]}) > 1
    }
    if not costs:
        return None
    figure = Drawing(4.8, 6.4 * len(costs))
    panels = figure.subplots(1, len(costs), squeeze=False).ravel()
    for panel, (metric, (title, unit, more_is_better)) in zip(panels, costs.items(), strict=True):
        points = [
            (row.metrics[metric] / unit, row.metrics["kld"], _name(results, row))
            for row in having[metric]
        ]
        best = _front(points, more_is_better)
        panel.grid(True)
        panel.plot(*zip(*best, strict=True), color=GRID, linewidth=1.5, zorder=1)
        for x, y, name in points:
            panel.plot(x, y, "o", color=BLUE if (x, y) in best else PALE, markersize=6)
            figure.point(panel, x, y, f"{name}: {title} {number(x)}, {LABELS['kld']} {number(y)}")
        _set_logarithmic(panel, "y", [y for _, y, _ in points])
        xs = [x for x, _, _ in points]
        if max(xs) > 8 * min(xs):
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(title)
        panel.set_ylabel(LABELS["kld"])
        panel.margins(x=0.14, y=0.08)
        figure.canvas.draw()  # Where points lie on the page is known from here on.
        _annotate(panel, sorted(points, key=lambda p: (p[0], p[1]) not in best), best)
    better = "Lower is better; blue points are those that no other beats in both."
    return Picture("What it costs to be near", better, figure)


def _annotate(
    panel: Axes, points: Sequence[tuple[float, float, str]], best: Sequence[tuple[float, float]]
) -> None:
    """Names beside points, best ones first, each where it covers no other; else left out."""
    scale = panel.figure.dpi / 72
    taken: list[tuple[float, float, float, float]] = []
    for x, y, _ in points:
        px, py = panel.transData.transform((x, y))
        taken.append((px - 3 * scale, py - 3 * scale, px + 3 * scale, py + 3 * scale))
    for x, y, name in points:
        px, py = panel.transData.transform((x, y))
        width, height = 5.2 * len(name) * scale, 9 * scale
        for dx, dy, side in ((7, -3, "left"), (-7, -3, "right"), (5, 5, "left"), (5, -12, "left")):
            left = px + dx * scale - (width if side == "right" else 0)
            bottom = py + dy * scale
            box = (left, bottom, left + width, bottom + height)
            if not any(_overlap(box, other) for other in taken):
                taken.append(box)
                panel.annotate(
                    literal(name),
                    (x, y),
                    (dx, dy),
                    textcoords="offset points",
                    ha=side,
                    fontsize=8,
                    color=INK if (x, y) in best else MUTED,
                )
                break


Box = tuple[float, float, float, float]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _front(points: Sequence[tuple[float, float, str]], more: bool) -> list[tuple[float, float]]:
    """The points for which no other has both a better x and a lower y, from left to right."""
    best: list[tuple[float, float]] = []
    for x, y, _ in sorted(points, key=lambda p: (-p[0] if more else p[0], p[1])):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return sorted(best)


def _name(results: Results, row: Row) -> str:
    values = [
        clipped(shown(row.overrides[f])) for f in results.swept if row.overrides.get(f) is not None
    ]
    return " ".join([*([row.run] if len(results.names) > 1 else []), *values]) or row.run
