"""Scales of heat maps: pale where all is rounding, and of many colours where all is wrong."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from qwen_jax.reporting.drawing import Drawing
from qwen_jax.reporting.heat_map import MOST_CELLS, Scale, bar, show

UNIT = 2.0**-24


def drawn(values: np.ndarray) -> tuple[np.ndarray, list[str], Drawing]:
    """Colours, the labels of the scale, and the drawing."""
    figure = Drawing(3.0)
    axes = figure.subplots()
    scale = Scale.of(values, UNIT)
    image = show(figure, axes, values, scale, lambda row, first, stop: f"{row}, {first}:{stop}")
    bar(figure, image, [axes], "error", values)
    labels = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    return image.to_rgba(image.get_array())[..., :3], labels, figure


def test_failing_values_take_all_the_colours() -> None:
    """From rounding to the largest error they would all be the darkest of them."""
    values = np.geomspace(0.4, 6, 60).reshape(6, 10)
    colours, labels, _ = drawn(values)
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) > 30
    assert np.ptp(colours.sum(axis=-1)) > 1  # of 3 between black and white
    low, high = float(labels[0]), float(labels[-1])
    assert 0.4 <= low < 0.6 and 4 < high <= 6
    assert f"from {labels[0]} to {labels[-1]}, all of it far above" in Scale.of(
        values, UNIT
    ).sentence(UNIT)


def test_one_odd_value_does_not_take_them() -> None:
    values = np.geomspace(0.4, 6, 100).reshape(10, 10)
    values[0, 0] = 1e30
    colours, labels, _ = drawn(values)
    assert float(labels[-1]) < 10 and np.ptp(colours.sum(axis=-1)) > 1


def test_rounding_is_pale() -> None:
    colours, labels, _ = drawn(UNIT * np.linspace(0.5, 4, 100).reshape(10, 10))
    assert colours.sum(axis=-1).min() > 2 and float(labels[-1]) == pytest.approx(6e-5)


@pytest.mark.parametrize("value", [0.0, np.inf, 1.0])
def test_values_that_are_all_the_same(value: float) -> None:
    colours, labels, figure = drawn(np.full((3, 4), value))
    figure.svg("p")
    assert len(labels) >= 2 and colours.shape == (3, 4, 3)


def test_large_maps_say_the_worst_of_neighbours() -> None:
    values = np.ones((10, 1000))
    values[3, 7] = 5
    _, _, figure = drawn(values)
    texts = [text for _, _, text in figure.values]
    assert len(texts) <= MOST_CELLS and "3, 4:8: 5" in texts
