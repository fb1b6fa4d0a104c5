"""A figure that says its values where a pointer rests on them, without a script."""

import html
import io
import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from qwen_jax.reporting.style import WIDTH
from qwen_jax.terminal import visible

_RADIUS = 4.0
"""Points around a mark that belong to it."""


class Drawing(Figure):
    """A figure with a text for each mark that it shows."""

    def __init__(self, height: float, width: float = WIDTH):
        apart = ConstrainedLayoutEngine(hspace=0.08)  # titles from the ticks above them
        super().__init__(figsize=(width, height), layout=apart, facecolor="white")
        self.values: list[tuple[Axes, tuple[float, float, float, float], str]] = []

    def point(self, axes: Axes, x: float, y: float, text: str) -> None:
        """What a mark at `x` and `y`, as they are drawn, stands for."""
        self.cell(axes, (x, y, x, y), text)

    def cell(self, axes: Axes, corners: tuple[float, float, float, float], text: str) -> None:
        """What a rectangle `(x, y, x, y)` stands for."""
        self.values.append((axes, corners, text))

    def svg(self, name: str) -> str:
        """The picture as an element of a page, where `name` keeps its ids apart from others'."""
        out = io.StringIO()
        # Without a date the same report gives the same file.
        self.savefig(out, format="svg", metadata={"Date": None})
        drawn = out.getvalue()
        drawn = drawn[drawn.index("<svg") :]
        drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
        # HTML knows the namespaces, and a page that names no address can't ask for one.
        drawn = re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawn)
        drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawn)
        return drawn.replace("</svg>", f"{self._targets()}</svg>")

    def _targets(self) -> str:
        """A transparent rectangle a mark, whose title a browser shows."""
        if not self.values:
            return ""
        ends = [axes.transData.transform([where[:2], where[2:]]) for axes, where, _ in self.values]
        corners = np.sort(np.stack(ends), axis=1) * 72 / self.dpi
        left, right = corners[:, :, 0].T
        # SVG counts from the top, a figure from the bottom.
        bottom, top = self.bbox.height * 72 / self.dpi - corners[:, :, 1].T
        point = (right == left) & (top == bottom)
        out = ['<g class="values">']
        for x, y, width, height, (_, _, text) in zip(
            left - _RADIUS * point,
            top - _RADIUS * point,
            right - left + 2 * _RADIUS * point,
            bottom - top + 2 * _RADIUS * point,
            self.values,
            strict=True,
        ):
            title = html.escape(visible(text))
            out.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
                f"<title>{title}</title></rect>"
            )
        return "\n".join([*out, "</g>"])
