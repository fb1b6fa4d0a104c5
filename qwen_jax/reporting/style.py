"""How pictures look: one size of text, one palette, logarithmic axes over whole decades.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell
apart, without their yellow, too pale for lines on white.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullLocator

from qwen_jax.terminal import visible

INK, MUTED, PALE, GRID = "#22303c", "#55626d", "#8a97a3", "#e3e8ec"
BLUE, RED, GREEN = "#0072b2", "#d55e00", "#009e73"
PINK, SKY, GOLD, BLACK = "#cc79a7", "#56b4e9", "#e69f00", "#000000"
COLOURS = (BLUE, RED, GREEN, PINK, SKY, GOLD, BLACK)
_MARKERS = "osD^vPX*<>"
_DASHES = ("-", "--", ":", "-.")

WIDTH = 9.0
"""Inches of a picture; the page shows it at about 900 pixels."""

_SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "svg.fonttype": "path",  # so that a page reads the same without our fonts
    "svg.hashsalt": "qwen_jax",  # so that equal results are equal files
    "image.interpolation": "nearest",
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw and save inside of it."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def series(index: int) -> dict[str, str]:
    """Colour, marker and dashes of one of several lines; no two of the first 70 share the first
    two, and no two of the first 28 colour and dashes."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _DASHES[index // len(COLOURS) % len(_DASHES)],
    }


def logarithmic(axes: Axes, which: str, low: float, high: float) -> None:
    """A logarithmic axis: whole decades and at most eight labels, or, for less than two decades,
    a little more than what is drawn and labels in between."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    short = high < 100 * low
    if short:
        low, high = low / 1.4, high * 1.4
    else:
        low, high = 10.0 ** np.floor(np.log10(low)), 10.0 ** np.ceil(np.log10(high))
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if short else (1,), numticks=8))
    axis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
    axis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", axis="x" if which == "x" else "y", color=GRID, linewidth=0.8)


def span(values: np.ndarray) -> tuple[float, float]:
    """The least and the largest positive finite value; 1e-9 and 1 where there is none."""
    inside = values[np.isfinite(values) & (values > 0)]
    return (float(inside.min()), float(inside.max())) if inside.size else (1e-9, 1.0)


def literal(text: str) -> str:
    """A text that matplotlib draws as it is: between two dollars it would read a formula, and at
    half of a surrogate pair it fails."""
    shown = visible(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return shown.replace("$", r"\$")
