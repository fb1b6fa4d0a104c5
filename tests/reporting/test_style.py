"""The palette: more than ten lines can be told apart, by colour-blind readers, too."""

import itertools

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb

from qwen_jax.reporting.drawing import Drawing
from qwen_jax.reporting.style import COLOURS, literal, series

# Viénot, Brettel and Mollon (1999): linear RGB as those see it who lack one kind of cones.
DEUTERANOPIA = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1]])
PROTANOPIA = np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1]])


@pytest.mark.parametrize("seen", [np.eye(3), DEUTERANOPIA, PROTANOPIA])
def test_no_two_colours_look_alike(seen: np.ndarray) -> None:
    linear = [seen @ np.array(to_rgb(colour)) ** 2.2 for colour in COLOURS]
    shown = [np.clip(colour, 0, 1) ** (1 / 2.2) for colour in linear]
    for one, other in itertools.combinations(shown, 2):
        assert np.linalg.norm(one - other) > 0.12


def test_no_two_lines_look_alike() -> None:
    looks = [series(i) for i in range(28)]
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 28
    assert len({(look["color"], look["marker"]) for look in looks}) == 28


@pytest.mark.parametrize("text", ["$\\frac", "a $1 and $2", "$\\bad{$", "plain", "\ud800\x1b"])
def test_dollars_are_dollars(text: str) -> None:
    """Between two of them matplotlib would read a formula, and fail at what is none."""
    drawn = Drawing(2.0)
    drawn.subplots().set_title(literal(text))
    drawn.svg("p")
