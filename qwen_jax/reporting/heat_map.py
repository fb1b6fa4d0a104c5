"""Panels of colours on one logarithmic scale, which follows its data and says its limits."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm
from matplotlib.image import AxesImage
from matplotlib.ticker import NullLocator

from qwen_jax.reporting.drawing import Drawing
from qwen_jax.reporting.table import number

NOTHING = "#f1f3f5"
"""The colour of no error at all, which has no place on a logarithmic scale."""

MOST_CELLS = 3000
"""Values on hover of one panel; of larger ones, the largest of neighbours."""


class Scale(NamedTuple):
    """From the smallest to the largest colour.

    Attributes:
        all_wrong: even the smallest is far above rounding, so that no colour looks harmless.
    """

    low: float
    high: float
    all_wrong: bool

    @classmethod
    def of(cls, values: np.ndarray, unit: float) -> "Scale":
        """From rounding, a quarter of the `unit` roundoff, up to the data and at least 1,000 units,
        so that a clean run is pale; where nearly all is above that, over the data alone.

        A fiftieth at each end may lie outside, or one odd value would take all the colours.
        """
        inside = values[np.isfinite(values) & (values > 0)]
        if not inside.size:
            return cls(unit / 4, 1000 * unit, False)
        low, high = (float(x) for x in np.quantile(inside, (0.02, 0.98)))
        if low <= 1000 * unit:
            return cls(max(unit / 4, min(low, unit)), max(high, 1000 * unit), False)
        return cls(low, max(high, 1.5 * low), True)

    def sentence(self, unit: float) -> str:
        if self.all_wrong:
            return (
                f"The scale runs from {number(self.low)} to {number(self.high)}, all of it far "
                f"above rounding, {number(unit)}."
            )
        return (
            f"The scale runs from {number(self.low)} to {number(self.high)}; rounding once is "
            f"{number(unit)}."
        )

    def colours(self) -> Colormap:
        # The darkest end is left for what lies above.
        name, over = ("OrRd", "#4a0000") if self.all_wrong else ("YlGnBu", "#081d58")
        part = colormaps[name](np.linspace(0.12 if self.all_wrong else 0.0, 0.95, 256))
        under = part[0] if self.all_wrong else NOTHING
        found = LinearSegmentedColormap.from_list(name, part, 256)
        return found.with_extremes(under=under, bad=NOTHING, over=over)


def show(
    drawn: Drawing,
    axes: Axes,
    values: np.ndarray,
    scale: Scale,
    name: Callable[[int, int, int], str],
    start: int = 0,
) -> AxesImage:
    """Draws `[rows, columns]`, the first column at `start`.

    Args:
        name: of a row and its columns from the second to before the third argument, for the values.
    """
    rows, columns = values.shape
    # Infinite errors, where there is a NaN, take the darkest colour; 0 is none.
    finite = np.where(np.isinf(values), np.finfo(np.float64).max, values)
    image = axes.imshow(
        np.ma.masked_where(~(finite > 0), finite),
        aspect="auto",
        cmap=scale.colours(),
        norm=LogNorm(scale.low, scale.high),
        extent=(start - 0.5, start + columns - 0.5, rows - 0.5, -0.5),
    )
    axes.spines[:].set_visible(False)
    step = -(-rows * columns // MOST_CELLS)
    for row in range(rows):
        for first in range(0, columns, step):
            stop = min(first + step, columns)
            worst = float(np.max(values[row, first:stop]))
            corners = (start + first - 0.5, row - 0.5, start + stop - 0.5, row + 0.5)
            drawn.cell(axes, corners, f"{name(row, first, stop)}: {number(worst)}")
    return image


def bar(
    drawn: Drawing, image: AxesImage, panels: list[Axes], label: str, values: np.ndarray
) -> None:
    """The scale beside the panels, its limits named; pointed where values lie beyond."""
    low, high = image.get_clim()
    assert low is not None and high is not None
    ends = (bool(((values > 0) & (values < low)).any()), bool((values > high).any()))
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[ends]
    drawn_bar = drawn.colorbar(image, ax=panels, shrink=0.9, pad=0.01, aspect=28, extend=extend)
    inside = [x for i in range(-20, 20) if 2 * low < (x := 10.0**i) < high / 2]
    ticks = [low, *inside[:: max(1, len(inside) // 5)], high]
    drawn_bar.set_ticks(ticks, labels=[number(x) for x in ticks])
    drawn_bar.ax.yaxis.set_minor_locator(NullLocator())
    drawn_bar.set_label(label)
    drawn_bar.outline.set_visible(False)
