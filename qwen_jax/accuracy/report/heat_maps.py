"""Heat maps: which heads and which positions are far from the reference."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from qwen_jax.accuracy.exact.rounding import UNIT
from qwen_jax.accuracy.tensors.comparison import Comparison
from qwen_jax.accuracy.traces.trace import AXES, split_name
from qwen_jax.reporting.drawing import Drawing
from qwen_jax.reporting.heat_map import Scale, bar, show
from qwen_jax.reporting.style import INK

LABEL = "RMS error / RMS of the reference"


class HeatMap(NamedTuple):
    """A picture, and a sentence that says the limits of its scale."""

    drawing: Drawing
    scale: str


def by_head(comparison: Comparison) -> HeatMap | None:
    """Layers by heads, one panel a tensor that has heads; over all positions."""
    maps = dict(_head_maps(comparison))
    every = np.concatenate([m.ravel() for m in maps.values()]) if maps else np.zeros(0)
    if not (every > 0).any():
        return None
    columns = 4
    lines = -(-len(maps) // columns)
    layers = max(m.shape[0] for m in maps.values())
    height = float(np.clip(0.55 + 0.17 * layers, 1.5, 4.5))
    drawn = Drawing(height * lines + 0.4)
    panels = drawn.subplots(lines, columns, squeeze=False).ravel()
    unit = UNIT[comparison.candidate.activation_dtype]
    scale = Scale.of(every, unit)
    for at, (panel, (name, values)) in enumerate(zip(panels, maps.items(), strict=False)):
        image = show(drawn, panel, values, scale, _name_of_head)
        panel.set_title(name)
        _whole_ticks(panel, "x", values.shape[1])
        _whole_ticks(panel, "y", values.shape[0])
        panel.set_xlabel("head" if at >= len(maps) - columns else "")
        panel.set_ylabel("layer" if at % columns == 0 else "")
    for panel in panels[len(maps) :]:
        panel.set_visible(False)
    bar(drawn, image, list(panels), LABEL, every)
    return HeatMap(drawn, scale.sentence(unit))


def _name_of_head(layer: int, first: int, stop: int) -> str:
    heads = f"head {first}" if stop == first + 1 else f"heads {first} to {stop - 1}"
    return f"layer {layer}, {heads}"


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


def by_position(comparison: Comparison) -> HeatMap | None:
    """Operations by positions, the worst layer of each; a line where a call of several ended."""
    groups: dict[str, list[np.ndarray]] = {}
    for name, errors in comparison.by_position.items():
        groups.setdefault(split_name(name)[1], []).append(errors)
    names = [operation for operation in AXES if operation in groups]
    if not any((errors > 0).any() for found in groups.values() for errors in found):
        return None
    values = np.stack([np.max(groups[name], axis=0) for name in names])
    drawn = Drawing(0.9 + 0.21 * len(names))
    axes = drawn.subplots()
    unit = UNIT[comparison.candidate.activation_dtype]
    scale = Scale.of(values, unit)

    def name_of(row: int, first: int, stop: int) -> str:
        at = comparison.start + first
        last = comparison.start + stop - 1
        return f"{names[row]}, {f'position {at}' if at == last else f'positions {at} to {last}'}"

    image = show(drawn, axes, values, scale, name_of, comparison.start)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("position")
    for boundary in _boundaries(comparison):
        axes.axvline(boundary - 0.5, color=INK, lw=1, ls=(0, (4, 3)))
    bar(drawn, image, [axes], LABEL, values)
    return HeatMap(drawn, scale.sentence(unit))


def _boundaries(comparison: Comparison) -> list[int]:
    """Where calls of several tokens ended; decode steps are one call a position."""
    starts = np.cumsum(comparison.candidate.chunks)
    long = [int(s) for s, n in zip(starts, comparison.candidate.chunks, strict=True) if n > 1]
    stop = comparison.start + len(next(iter(comparison.by_position.values())))
    return [at for at in long if comparison.start < at < stop]


def _whole_ticks(axes: Axes, which: str, count: int) -> None:
    step = next(s for s in (1, 2, 5, 10, 20, 50) if count / s <= 8 or s == 50)
    (axes.set_xticks if which == "x" else axes.set_yticks)(range(0, count, step))
