"""How far the values somebody holds are from the values they should hold, in units of rounding."""

import dataclasses

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, Shaped

from qwen_jax.accuracy import spread

_STEP = 1 << 20
"""Values compared at once, so that no float64 copy of a tensor exists."""

_U32 = 2.0**-24


def is_float(dtype: np.dtype) -> bool:
    """float64, float32 and all that is narrower, float8 too."""
    try:
        return dtype.kind != "c" and bool(ml_dtypes.finfo(dtype).bits)
    except ValueError:
        return False


def is_finite(values: Float[np.ndarray, "rows ..."]) -> bool:
    """Whether all of them are."""
    parts = spread.parts(len(values), values[:1].size)
    return all(spread.each(lambda part: bool(np.isfinite(values[part]).all()), parts))


def rounding(values: Float[np.ndarray, "..."], dtype: np.dtype) -> Float[np.ndarray, "..."]:
    """How far a value rounded to `dtype` may lie from its float32 original, elementwise.

    Half a unit in the last place: u|x|, or half the smallest subnormal number next to zero
    (Higham, Accuracy and Stability, 2002, theorem 2.2 and equation 2.8). Two roundings to float32
    come on top, one on each side: every GGUF block format is d * q - m, in which the products of an
    11-bit scale and small integers are exact and the difference rounds once.
    """
    info = ml_dtypes.finfo(dtype)
    unit = float(info.eps) / 2 + 2 * _U32
    return unit * np.abs(values.astype(np.float64)) + float(info.smallest_subnormal) / 2


@dataclasses.dataclass(frozen=True)
class Difference:
    """A tensor against what it should be.

    Attributes:
        values: how many were compared.
        outside: how many differ by more than rounding; NaN equals NaN.
        error: ||candidate - expected|| / ||expected||; infinite where only one is finite.
        rows: of each row, how many values lie outside.
        exact: whether all are the expected values rounded to nearest, bit for bit.
    """

    values: int
    outside: int
    error: float
    rows: Int[np.ndarray, " rows"]
    exact: bool

    @property
    def fits(self) -> bool:
        return self.outside == 0

    @property
    def span(self) -> tuple[int, int]:
        """The rows from the first to the last that differ, as [start, stop)."""
        wrong = np.flatnonzero(self.rows)
        return (int(wrong[0]), int(wrong[-1]) + 1) if wrong.size else (0, 0)


def residual(
    candidate: Shaped[np.ndarray, "rows ..."], expected: Float[np.ndarray, "rows ..."]
) -> Difference:
    """Compares arrays of one shape; the bound is that of the candidate's dtype."""
    if candidate.shape != expected.shape:
        raise ValueError(f"{candidate.shape=} is not {expected.shape=}")
    parts = spread.parts(len(candidate), candidate[:1].size)
    rows = np.zeros(len(candidate), np.int64)

    def compared(part: slice) -> tuple[float, bool]:
        with np.errstate(all="ignore"):
            rows[part], squares, exact = _compared(candidate[part], expected[part])
        return squares, exact

    def norm(part: slice) -> float:
        with np.errstate(all="ignore"):
            want = expected[part].astype(np.float64)
            return float(np.sum(np.where(np.isfinite(want), want, 0.0) ** 2))

    found = spread.each(compared, parts)
    squares = sum(of_part for of_part, _ in found)
    error = 0.0
    if squares:
        size = sum(spread.each(norm, parts))
        error = (squares / size) ** 0.5 if size else np.inf
    error = float(error) if np.isfinite(error) else float("inf")
    exact = all(of_part for _, of_part in found)
    return Difference(candidate.size, int(rows.sum()), error, rows, exact)


def _compared(
    have: Shaped[np.ndarray, "rows ..."], want: Float[np.ndarray, "rows ..."]
) -> tuple[Int[np.ndarray, " rows"] | int, float, bool]:
    """Of a part: each row's values outside, the error's squares, and whether all is exact."""
    dtype = have.dtype
    have = have.astype(np.float32) if dtype.itemsize < 4 else have
    if (have == want).all():
        return 0, 0.0, True
    rounded = want.astype(dtype).astype(have.dtype)
    if (have == rounded).all():  # to nearest, which is inside
        difference = np.subtract(have, want, dtype=np.float64).reshape(-1)
        squares = float(difference @ difference)
        if np.isfinite(squares):
            return 0, squares, True
    exact = np.array_equal(have, rounded, equal_nan=True)
    have, want64 = have.astype(np.float64), want.astype(np.float64)
    same = (have == want64) | (np.isnan(have) & np.isnan(want64))
    difference = np.where(same, 0.0, have - want64)
    squares = float(np.sum(difference**2))
    near = np.abs(difference) <= rounding(want, dtype)
    outside = ~(near & np.isfinite(difference)) & ~same
    return outside.reshape(len(outside), -1).sum(axis=1), squares, exact


def relative_error(values: Float[np.ndarray, "..."], right: Float[np.ndarray, "..."]) -> float:
    """||values - right|| / ||right||, summed in float64; 0 where they are the same."""
    a, b = values.reshape(-1), right.reshape(-1)
    squares = norm = 0.0
    for start in range(0, a.size, _STEP):
        want = b[start : start + _STEP].astype(np.float64)
        difference = a[start : start + _STEP] - want
        squares += float(difference @ difference)
        norm += float(want @ want)
    return (squares / norm) ** 0.5 if norm else (float("inf") if squares else 0.0)
