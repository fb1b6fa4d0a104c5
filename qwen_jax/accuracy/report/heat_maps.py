"""Heat maps: which heads and which positions are far from the reference."""

from collections.abc import Iterator

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from qwen_jax.accuracy.exact.rounding import UNIT
from qwen_jax.accuracy.tensors.comparison import Comparison
from qwen_jax.accuracy.traces.trace import AXES, split_name
from qwen_jax.reporting.style import RED, figure, span

NOTHING = "#f1f3f5"
"""The colour of no error at all, which has no place on a logarithmic scale."""

# Pale is small; the darkest end is left out, so that outlines stay visible on it.
_COLOURS = colormaps["YlGnBu"].with_extremes(under=NOTHING, bad=NOTHING, over="#081d58")


def by_head(comparison: Comparison) -> Figure | None:
    """Layers by heads, one panel a tensor that has heads; over all positions."""
    maps = dict(_head_maps(comparison))
    if not maps:
        return None
    columns = 4
    lines = -(-len(maps) // columns)
    layers = max(m.shape[0] for m in maps.values())
    height = float(np.clip(0.55 + 0.17 * layers, 1.5, 4.5))
    drawn = figure(height * lines + 0.4)
    panels = drawn.subplots(lines, columns, squeeze=False).ravel()
    norm = _norm(np.concatenate([m.ravel() for m in maps.values()]), comparison)
    image = None
    for at, (panel, (name, values)) in enumerate(zip(panels, maps.items(), strict=False)):
        image = _show(panel, values, norm)
        panel.set_title(name)
        _whole_ticks(panel, "x", values.shape[1])
        _whole_ticks(panel, "y", values.shape[0])
        panel.set_xlabel("head" if at >= len(maps) - columns else "")
        panel.set_ylabel("layer" if at % columns == 0 else "")
    for panel in panels[len(maps) :]:
        panel.set_visible(False)
    assert image is not None
    _bar(drawn, image, list(panels))
    return drawn


def _head_maps(comparison: Comparison) -> Iterator[tuple[str, np.ndarray]]:
    """Of each operation with heads: RMS over positions, `[layers, heads]`."""
    for operation in AXES:
        found = {
            split_name(name)[0]: np.sqrt(np.mean(errors**2, axis=0))
            for name, errors in comparison.by_head.items()
            if split_name(name)[1] == operation
        }
        if found:
            count = comparison.candidate.model_config.num_layers
            heads = len(next(iter(found.values())))
            empty = np.full(heads, np.nan)
            yield operation, np.stack([found.get(i, empty) for i in range(count)])


def by_position(comparison: Comparison) -> Figure:
    """Operations by positions, the worst layer of each; an outline where a call began."""
    groups: dict[str, list[np.ndarray]] = {}
    for name, errors in comparison.by_position.items():
        groups.setdefault(split_name(name)[1], []).append(errors)
    names = [operation for operation in AXES if operation in groups]
    values = np.stack([np.max(groups[name], axis=0) for name in names])
    drawn = figure(0.9 + 0.21 * len(names))
    axes = drawn.subplots()
    start, count = comparison.start, values.shape[1]
    image = _show(axes, values, _norm(values, comparison), (start - 0.5, start + count - 0.5))
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("position")
    for boundary in _boundaries(comparison):
        axes.axvline(boundary - 0.5, color=RED, lw=1, ls=(0, (4, 3)))
    _bar(drawn, image, [axes])
    return drawn


def _boundaries(comparison: Comparison) -> list[int]:
    """Where calls of several tokens ended; decode steps are one call a position."""
    starts = np.cumsum(comparison.candidate.chunks)
    long = [int(s) for s, n in zip(starts, comparison.candidate.chunks, strict=True) if n > 1]
    stop = comparison.start + len(next(iter(comparison.by_position.values())))
    return [at for at in long if comparison.start < at < stop]


def _norm(values: np.ndarray, comparison: Comparison) -> LogNorm:
    """From a quarter of the dtype's unit roundoff to 1,000 of it, or to the largest error.

    So a clean run is pale, whatever its dtype, and a colour means the same in all reports of one.
    """
    unit = UNIT[comparison.candidate.activation_dtype]
    return LogNorm(unit / 4, max(span(values)[1], 1000 * unit))


def _show(
    axes: Axes, values: np.ndarray, norm: LogNorm, across: tuple[float, float] | None = None
) -> AxesImage:
    extent = None if across is None else (*across, len(values) - 0.5, -0.5)
    # Infinite errors, where there is a NaN, take the darkest colour.
    finite = np.where(np.isinf(values), np.finfo(np.float64).max, values)
    image = axes.imshow(finite, aspect="auto", cmap=_COLOURS, norm=norm, extent=extent)
    axes.spines[:].set_visible(False)
    return image


def _whole_ticks(axes: Axes, which: str, count: int) -> None:
    step = next(s for s in (1, 2, 5, 10, 20, 50) if count / s <= 8 or s == 50)
    (axes.set_xticks if which == "x" else axes.set_yticks)(range(0, count, step))


def _bar(drawn: Figure, image: AxesImage, panels: list[Axes]) -> None:
    bar = drawn.colorbar(image, ax=panels, shrink=0.9, pad=0.01, aspect=28)
    bar.set_label("RMS error / RMS of the reference")
    bar.outline.set_visible(False)
    bar.minorticks_off()
