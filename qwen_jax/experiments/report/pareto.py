"""What it costs to be near: KL divergence against speed and memory."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from qwen_jax.experiments.declaration import clipped
from qwen_jax.experiments.report.results import Results, Row
from qwen_jax.experiments.report.scales import set_logarithmic
from qwen_jax.experiments.report.tables import number, shown
from qwen_jax.reporting.drawing import Drawing
from qwen_jax.reporting.page import Picture
from qwen_jax.reporting.style import BLUE, GRID, INK, MUTED, PALE, literal

KLD = "KL divergence (nats)"


def pareto(results: Results) -> Picture | None:
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
        best = front(points, more_is_better)
        panel.grid(True)
        panel.plot(*zip(*best, strict=True), color=GRID, linewidth=1.5, zorder=1)
        for x, y, name in points:
            panel.plot(x, y, "o", color=BLUE if (x, y) in best else PALE, markersize=6)
            figure.point(panel, x, y, f"{name}: {title} {number(x)}, {KLD} {number(y)}")
        set_logarithmic(panel, "y", [y for _, y, _ in points])
        xs = [x for x, _, _ in points]
        if max(xs) > 8 * min(xs):
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(title)
        panel.set_ylabel(KLD)
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


def front(points: Sequence[tuple[float, float, str]], more: bool) -> list[tuple[float, float]]:
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
