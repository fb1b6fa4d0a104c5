"""How pictures look: one size of text, few colours, logarithmic axes over whole decades."""

import contextlib
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullLocator

INK, PALE, GRID = "#22303c", "#8a97a3", "#e3e8ec"
BLUE, RED, GOLD, GREEN = "#2b6cb0", "#c53030", "#b7791f", "#2f855a"
CYCLE = (BLUE, GOLD, GREEN, "#805ad5", "#0e7490", "#9c4221")

WIDTH = 9.0
"""Inches of a picture; the page shows it at about 1,000 pixels."""

_SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "svg.hashsalt": "qwen_jax",
    "image.interpolation": "nearest",
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw and save inside of it."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def figure(height: float, width: float = WIDTH) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


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
