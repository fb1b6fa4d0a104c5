"""The answer as a picture: each setting's difference, and where it lies."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from qwen_jax.experiments.answers.answer import Answer, Entry
from qwen_jax.experiments.report.answer import name
from qwen_jax.reporting.drawing import Drawing
from qwen_jax.reporting.page import Picture
from qwen_jax.reporting.style import GREEN, INK, MUTED, PALE, RED, literal

MOST = 40
"""Settings that are drawn, from the best one on."""

_SIZES = 300
"""How many times as large as the smallest difference the largest is where all need room."""

_COLOURS = {"better": GREEN, "worse": RED, "baseline": INK}


def forest(answer: Answer) -> Picture | None:
    """The picture, or None where no difference could be judged."""
    entries = answer.entries[:MOST]
    if all(entry.low is None for entry in entries):
        return None
    several = len({entry.setting.run for entry in answer.entries}) > 1
    figure = Drawing(0.27 * len(entries) + 0.9)
    panel = figure.subplots()
    panel.axvline(0, color=PALE, linewidth=1)
    names = [name(entry.setting, several) for entry in entries]
    for row, (entry, of) in enumerate(zip(entries, names, strict=True)):
        colour, at = _COLOURS.get(entry.verdict, MUTED), entry.difference or 0.0
        filled = colour if entry.verdict != "baseline" else "white"
        if entry.low is not None and entry.high is not None:
            panel.plot([entry.low, entry.high], [row, row], color=colour, linewidth=2)
            of = f"{of}: {at:+.3g} ({entry.low:+.3g} to {entry.high:+.3g}), {entry.text}"
        panel.plot([at], [row], "o", color=colour, markerfacecolor=filled, markersize=6)
        figure.point(panel, at, row, of)
    panel.set_yticks(range(len(entries)), list(map(literal, names)))
    panel.set_ylim(len(entries) - 0.5, -0.5)
    panel.grid(True, axis="x")
    _scale(panel, entries)
    base = name(answer.baseline, several)
    better = "lower" if answer.lower else "higher"
    panel.set_xlabel(literal(f"{answer.metric} less that of {base} ({better} is better)"))
    left = f" The best {MOST} of {len(answer.entries)}." if len(answer.entries) > MOST else ""
    caption = (
        f"Lines are where a difference lies; green is better, red worse, grey not told apart.{left}"
    )
    return Picture("Differences", caption, figure)


def _scale(panel: Axes, entries: Sequence[Entry]) -> None:
    """Powers of ten stand evenly on both sides of 0 where differences are of many sizes."""
    sizes = [abs(entry.difference) for entry in entries if entry.difference]
    if not sizes or max(sizes) <= _SIZES * min(sizes):
        return
    limits = [x for e in entries for x in (e.low, e.high, e.difference) if x is not None]
    first = math.floor(math.log10(min(sizes)))
    last = math.ceil(math.log10(max(map(abs, limits))))
    linear = 10.0**first
    panel.set_xscale("symlog", linthresh=linear, linscale=0.5)
    ends = [end if abs(end) > linear else 0.0 for end in (min(limits), max(limits))]
    panel.set_xlim(min(2 * ends[0], -linear), max(2 * ends[1], linear))
    both = ends[0] < 0 < ends[1]
    step = max(1, (last - first) // (3 if both else 6))
    powers = [10.0**power for power in range(last, first + 1, -step)]
    below = [-power for power in powers] if ends[0] < 0 else []
    above = powers if ends[1] > 0 else []
    panel.set_xticks([*below, 0.0, *above])
    panel.xaxis.set_minor_locator(NullLocator())
