"""Where in a tensor an error lies, for people: positions, heads, dimensions, and how it looks."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

MANY = 4
"""Ranges that are listed before the rest is only counted."""


@dataclasses.dataclass(frozen=True)
class ErrorShape:
    """Which elements are past their bounds.

    Attributes:
        share: of all elements.
        positions: ranges of the recorded positions, such as "1-63"; "all" where none is right.
        heads: likewise, of a tensor with heads.
        dimensions: likewise of its last axis: dimensions, or slots of scores.
        look: what the error itself looks like, where it is simple.
    """

    share: float
    positions: str
    heads: str | None
    dimensions: str
    look: str | None

    def __str__(self) -> str:
        heads = f", heads {self.heads}" if self.heads else ""
        look = f"; {self.look}" if self.look else ""
        return (
            f"{self.share:.1%} of the elements: positions {self.positions}{heads}, "
            f"last axis {self.dimensions}{look}"
        )


def describe(
    candidate: Float[np.ndarray, "T ..."],
    expected: Float[np.ndarray, "T ..."],
    limit: Float[np.ndarray, "T ..."],
) -> ErrorShape:
    """The shape of `candidate - expected` where it passes `limit`."""
    with np.errstate(all="ignore"):
        same = (candidate == expected) | (np.isnan(candidate) & np.isnan(expected))
        wrong = ~(same | (np.abs(candidate - expected) <= limit))

    def along(axis: int) -> str:
        others = tuple(i for i in range(wrong.ndim) if i != axis)
        return ranges(wrong.any(axis=others))

    return ErrorShape(
        share=float(wrong.mean()),
        positions=along(0),
        heads=along(1) if wrong.ndim == 3 else None,
        dimensions=along(wrong.ndim - 1),
        look=_look(candidate, expected, limit),
    )


def _look(candidate: np.ndarray, expected: np.ndarray, limit: np.ndarray) -> str | None:
    # A masked score is -inf, and right; a NaN is wrong in its place.
    odd = ~np.isfinite(candidate) & np.isfinite(expected)
    odd |= np.isnan(candidate) & ~np.isnan(expected)
    if odd.any():
        return f"{int(odd.sum())} elements are not finite"
    if not np.isfinite(candidate).all() or not np.isfinite(expected).all():
        return None
    if not candidate.any():
        return "all elements are zero"
    with np.errstate(over="ignore"):
        size = float((expected * expected).sum())
        factor = float((candidate * expected).sum()) / size if size else 0.0
    scaled = (np.abs(candidate - factor * expected) <= 2 * limit * max(abs(factor), 1)).all()
    if scaled:
        times = f"{factor:.6g}"
        return None if times == "1" else f"the tensor is {times} times what it should be"
    error = candidate - expected
    if len(error) > 1 and (np.abs(error - error.mean(axis=0)) <= 2 * limit).all():
        return "the error is the same at every position, as of a wrong bias"
    return None


def ranges(flags: Sequence[bool] | np.ndarray) -> str:
    """True places as ranges: "all", "none", or such as "0-3, 7"."""
    flags = np.asarray(flags)
    if flags.all():
        return "all"
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    pairs = [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    listed = [f"{a}" if a == b else f"{a}-{b}" for a, b in pairs[:MANY]]
    if len(pairs) > MANY:
        left = sum(b - a + 1 for a, b in pairs[MANY:])
        listed.append(f"and {left} more up to {pairs[-1][1]}")
    return ", ".join(listed) or "none"
