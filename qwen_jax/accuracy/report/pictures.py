"""The report's pictures: errors by layer and operation, bounds, KL, the precision search."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_jax.accuracy.distribution.comparison import Distribution
from qwen_jax.accuracy.exact.replay import Finding
from qwen_jax.accuracy.quantisation.costs import Quantisation
from qwen_jax.accuracy.quantisation.pairs import kind_of, layer_of
from qwen_jax.accuracy.tensors.comparison import Comparison
from qwen_jax.accuracy.tensors.precision_search import PrecisionSearch
from qwen_jax.accuracy.traces.trace import AXES
from qwen_jax.reporting.drawing import Drawing
from qwen_jax.reporting.style import BLUE, GOLD, GRID, INK, PALE, RED, logarithmic, series, span
from qwen_jax.reporting.table import number

BY_LAYER = ("q_rope", "attn_out", "attn_residual", "ffn_act", "ffn_residual")
"""Tensors whose error is drawn layer by layer: before and after attention, and the stream."""


def error_by_layer(comparison: Comparison) -> Drawing | None:
    """RMS error of some tensors from layer to layer, and of the tensors before and after them."""
    rows = {row.name: row for row in comparison.rows}
    layers = sorted({row.layer for row in comparison.rows if row.layer is not None})
    known = {f"layers.{i}.{name}" for i in layers for name in BY_LAYER}
    if len(layers) < 2 or not rows.keys() & known:
        return None
    drawn = Drawing(4.0)
    axes = drawn.subplots()
    every: list[float] = []
    for index, operation in enumerate(BY_LAYER):
        found = [(i, rows[n]) for i in layers if (n := f"layers.{i}.{operation}") in rows]
        heights = np.array([row.metrics.rms_rel for _, row in found])
        every += heights.tolist()
        at = [i for i, _ in found]
        axes.plot(at, heights, ms=5, lw=1.6, label=operation, **series(index))  # type: ignore[arg-type]
        for i, height in zip(at, heights, strict=True):
            drawn.point(axes, i, height, f"{operation}, layer {i}: {number(height)}")
        bad = [(i, row.metrics.rms_rel) for i, row in found if row.verdict == "fault"]
        if bad:
            axes.plot(*zip(*bad, strict=True), "o", ms=10, mfc="none", mec=RED, mew=1.6, ls="none")
    if "logits" in rows:
        value = rows["logits"].metrics.rms_rel
        every.append(value)
        axes.plot([layers[-1] + 1], [value], "D", color=INK, ms=5, label="logits")
        drawn.point(axes, layers[-1] + 1, value, f"logits: {number(value)}")
    shown = layers[:: max(1, len(layers) // 12)]
    axes.set_xticks([*shown, layers[-1] + 1], [*map(str, shown), "logits"])
    axes.set_xlim(-0.3, layers[-1] + 1.3)
    logarithmic(axes, "y", *span(np.array(every)))
    axes.set_xlabel("layer")
    axes.set_ylabel("RMS error / RMS of the reference")
    if any(row.verdict == "fault" for row in comparison.rows):
        axes.plot([], [], "o", ms=10, mfc="none", mec=RED, mew=1.6, ls="none", label="own fault")
    drawn.legend(loc="outside right center")
    return drawn


def error_by_operation(comparison: Comparison) -> Drawing | None:
    """RMS error from the reference: a mark a layer, another where the operation is wrong itself."""
    if not comparison.rows:
        return None
    groups = {
        operation: [
            (row.metrics.rms_rel, row.verdict == "fault", row.layer)
            for row in comparison.rows
            if row.operation == operation
        ]
        for operation in AXES
    }
    return _strips(groups, "RMS error / RMS of the reference", None)


def calibration(findings: Sequence[Finding]) -> Drawing:
    """Own error over its bound: how far inside their bounds right operations stay."""
    groups = {
        operation: [
            (f.residual.ratio, f.faulty, f.layer) for f in findings if f.operation == operation
        ]
        for operation in AXES
    }
    return _strips(groups, "largest own error / its bound", 1.0)


def quantised_alone(q: Quantisation) -> Drawing | None:
    """What each tensor of a quantised file costs by itself: a mark a layer."""
    groups = {
        kind.name.removesuffix(".weight"): [
            (cost.alone.value, False, layer_of(cost.name))
            for cost in q.tensors
            if cost.alone and kind_of(cost.name) == kind.name
        ]
        for kind in q.kinds
    }
    if not any(groups.values()):
        return None
    return _strips(groups, "KL divergence with this tensor alone quantised, nats a token", None)


_MARK: dict[bool, dict[str, Any]] = {
    False: {"s": 16, "color": BLUE, "linewidths": 0, "alpha": 0.8},
    True: {"s": 26, "color": RED, "linewidths": 0, "marker": "D"},
}
"""How an operation within rounding and one at fault are drawn; not by colour alone."""


def _strips(
    groups: dict[str, list[tuple[float, bool, int | None]]], label: str, limit: float | None
) -> Drawing:
    """One line an operation, in the order of computation from the top; the first layer highest."""
    groups = {name: dots for name, dots in groups.items() if dots}
    drawn = Drawing(0.6 + 0.27 * len(groups))
    axes = drawn.subplots()
    values = np.array([value for dots in groups.values() for value, _, _ in dots])
    low, high = span(values)
    if limit is not None:
        low, high = min(low, 0.01 * limit), max(high, 2 * limit)
    logarithmic(axes, "x", low, high)
    left, right = axes.get_xlim()
    for y, (name, dots) in enumerate(groups.items()):
        # Zero and infinity have no place on this axis; they stand at its ends.
        x = np.clip([value for value, _, _ in dots], left * 1.15, right / 1.15)
        offset = np.linspace(-0.28, 0.28, len(dots)) if len(dots) > 1 else np.zeros(1)
        wrong = np.array([is_wrong for _, is_wrong, _ in dots])
        for kind, look in _MARK.items():
            axes.scatter(x[wrong == kind], (y + offset)[wrong == kind], **look, clip_on=False)
        for x_at, y_at, (value, _, layer) in zip(x, y + offset, dots, strict=True):
            where = name if layer is None else f"{name}, layer {layer}"
            drawn.point(axes, x_at, y_at, f"{where}: {number(value)}")
    for y in range(len(groups) - 1):
        axes.axhline(y + 0.5, color=GRID, lw=0.6)
    if limit is not None:
        axes.axvspan(limit, right, color=RED, alpha=0.06, lw=0)
        axes.axvline(limit, color=RED, lw=1, label="bound")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel(label)
    if limit is not None or any(wrong for dots in groups.values() for _, wrong, _ in dots):
        for is_wrong, name in ((False, "within rounding"), (True, "own fault")):
            axes.scatter([], [], **_MARK[is_wrong], label=name)
        drawn.legend(loc="outside upper right", ncols=3)
    return drawn


def kld(distribution: Distribution) -> Drawing | None:
    """The KL divergence of every scored token, on a logarithmic axis."""
    each = distribution.scores.kld
    if not (each > 0).any():
        return None
    quantiles = dict(distribution.kld_percentiles)
    positive = each[each > 0]
    low, high = span(positive)
    low = max(low, high * 1e-8)
    drawn = Drawing(3.6)
    axes = drawn.subplots()
    logarithmic(axes, "x", low, high)
    left, right = axes.get_xlim()
    edges = np.geomspace(left, right, 60)
    counts, _ = np.histogram(positive.clip(left, right), edges)
    axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.7)
    for count, left_edge, right_edge in zip(counts, edges, edges[1:], strict=False):
        if count:
            between = f"{number(left_edge)} to {number(right_edge)}: {count} tokens"
            drawn.cell(axes, (left_edge, 0, right_edge, count), between)
    marks = [("median", quantiles[50.0], INK), ("mean", distribution.kld.value, GOLD)]
    for name, value, colour in [*marks, ("99 %", quantiles[99.0], RED)]:
        if value > left:
            axes.axvline(value, color=colour, lw=1.5, label=f"{name}  {value:.2g}")
    axes.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor=GRID)
    below = len(each) - len(positive)
    more = f"; {below} of them 0 or below by rounding, not drawn" if below else ""
    axes.set_xlabel(f"KL divergence of one token, nats ({len(each)} tokens{more})")
    axes.set_ylabel("tokens")
    return drawn


def precision_steps(search: PrecisionSearch) -> Drawing | None:
    """The mean KL after each step of a greedy search."""
    if not search.steps:
        return None
    moves = [s.operation if s.kept else f"release {s.operation}" for s in search.steps]
    names = ["nothing", *moves]
    values = np.array([search.rounded_kld, *(step.kld for step in search.steps)])
    drawn = Drawing(0.8 + 0.27 * len(names))
    axes = drawn.subplots()
    low, high = span(np.append(values, search.bound))
    logarithmic(axes, "x", low, high)
    axes.step(values, range(len(values)), where="post", color=PALE, lw=1)
    colours = [BLUE if value <= search.bound else GOLD for value in values]
    axes.scatter(values, range(len(values)), c=colours, s=36, zorder=3)
    for y, (value, name) in enumerate(zip(values, names, strict=True)):
        drawn.point(axes, value, y, f"{name}: {number(value)}")
    axes.axvline(search.bound, color=RED, lw=1)
    axes.text(search.bound, -0.8, " bound", color=RED, fontsize=9, va="bottom")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.8)
    axes.set_xlabel(f"mean KL divergence, the rest rounded to {search.dtype}")
    axes.set_ylabel("kept in float32")
    return drawn
