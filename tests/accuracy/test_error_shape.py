"""What the shape of an error says, and what it does not claim."""

import numpy as np

from qwen_jax.accuracy.measures.error_shape import describe

RIGHT = np.random.default_rng(0).normal(size=(5, 8)) + 3
LIMIT = np.full(RIGHT.shape, 1e-6)


def test_a_factor_is_named_unless_it_is_one() -> None:
    assert describe(2.5 * RIGHT, RIGHT, LIMIT).look == "the tensor is 2.5 times what it should be"
    barely = RIGHT.copy()
    barely[2, 3] += 1.5e-6
    shape = describe(barely, RIGHT, LIMIT)
    assert (shape.positions, shape.dimensions, shape.look) == ("2", "3", None)


def test_masked_scores_are_not_counted_as_wrong() -> None:
    right = np.where(np.tri(5, 8, dtype=bool), RIGHT, -np.inf)
    wrong = right.copy()
    wrong[4, 0], wrong[4, 1], wrong[0, 7] = np.inf, np.nan, np.nan
    assert describe(wrong, right, LIMIT).look == "3 elements are not finite"
    wrong = right.copy()
    wrong[4, 0] += 1
    assert describe(wrong, right, LIMIT).look is None
