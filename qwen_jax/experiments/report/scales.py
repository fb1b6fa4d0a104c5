"""Axes of pictures: linear, logarithmic, or both about 0, and ticks that differ."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import (
    FuncFormatter,
    MaxNLocator,
    MultipleLocator,
    NullFormatter,
    NullLocator,
)

from qwen_jax.experiments.report.tables import shown


def scale_values(panel: Axes, values: Sequence[Any]) -> None:
    """Powers of two stand evenly."""
    if len(values) > 2 and min(values) > 0 and max(values) >= 8 * min(values):
        panel.set_xscale("log", base=2)
        told = _apart(sorted(values))
        panel.set_xticks(told, [shown(value) for value in told])
        panel.xaxis.set_minor_locator(NullLocator())


def _apart(values: Sequence[float]) -> list[float]:
    """Those of a logarithmic axis whose labels have room beside each other."""
    least = math.log2(values[-1] / values[0]) / 9
    found = [values[0]]
    for value in values[1:]:
        if math.log2(value / found[-1]) >= least:
            found.append(value)
    return found


def scale_metric(panel: Axes, seen: Sequence[float], side: str) -> None:
    """A share shows all from 0 to 1; several powers of ten stand evenly."""
    low, high = min(seen), max(seen)
    upright = side == "y"
    set_limits = panel.set_ylim if upright else panel.set_xlim
    ticks = panel.yaxis if upright else panel.xaxis
    if 0 <= low < 0.9 and 0.5 < high <= 1:
        set_limits(-0.03, 1.03)
        ticks.set_major_locator(MultipleLocator(0.25))
        ticks.set_major_formatter("{x:g}")
        return
    if (least := smallest(seen)) and high > (30 if low > 0 else 1000) * least:
        set_logarithmic(panel, side, seen)
        if low > 0 and high < 1000 * low:  # 20 and not 2 x 10^1
            ticks.set_major_formatter("{x:g}")
            ticks.set_minor_formatter(NullFormatter())
        return
    if 0 <= low < 0.5 * high:
        set_limits(0)
    if not upright:
        ticks.set_major_locator(MaxNLocator(4))
    ticks.set_major_formatter(
        FuncFormatter(lambda x, _: plain(x, ticks.get_majorticklocs().tolist()))
    )


def plain(x: float, ticks: Sequence[float]) -> str:
    """A tick with as many digits as tell it from its neighbours, whatever the numbers' size."""
    steps = [b - a for a, b in itertools.pairwise(ticks) if b > a]
    largest = max((abs(float(tick)) for tick in ticks), default=0.0)
    if not steps or largest == 0:
        return f"{x:g}"
    if abs(x) <= min(steps) / 1e6:
        return "0"
    digits = max(1, math.ceil(math.log10(largest / min(steps))) + 1)
    # As many as it takes to be the tick, and no neighbour of it: 12.5 is not 12.
    rounded = (float(f"{x:.{some}g}") for some in range(digits, 17))
    near = next((value for value in rounded if abs(value - x) < 1e-3 * min(steps)), x)
    return f"{near:.15g}"  # since two digits of 900 would be written 9e+02


def smallest(values: Sequence[float]) -> float | None:
    """The least value that is more than rounding, which may leave less than 0 of nothing."""
    noise = max(0.0, -min(values))
    return min((value for value in values if value > 10 * noise), default=None)


def set_logarithmic(panel: Axes, side: str, values: Sequence[float]) -> None:
    """Powers of ten stand evenly; there is a 0 for what is at or below it."""
    upright, least, high = side == "y", smallest(values), max(values)
    set_scale = panel.set_yscale if upright else panel.set_xscale
    if min(values) > 0:
        set_scale("log")
    elif least is not None:
        first, last = (math.floor(math.log10(value)) for value in (least, high))
        set_scale("symlog", linthresh=10.0**first, linscale=0.5)
        (panel.set_ylim if upright else panel.set_xlim)(-(10.0**first) / 2, 4 * high)
        step = max(1, (last - first) // (6 if upright else 3))
        powers = [10.0**power for power in range(last, first, -step)]
        (panel.yaxis if upright else panel.xaxis).set_ticks([0.0, *powers])
