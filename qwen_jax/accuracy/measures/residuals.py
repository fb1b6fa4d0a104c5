"""How far the values somebody holds are from the values they should hold, in units of rounding."""

import dataclasses

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, Shaped

_STEP = 1 << 20
"""Values compared at once, so that no float64 copy of a tensor exists."""

_U32 = 2.0**-24


def is_float(dtype: np.dtype) -> bool:
    """float64, float32 and all that is narrower, float8 too."""
    try:
        return dtype.kind != "c" and bool(ml_dtypes.finfo(dtype).bits)
    except ValueError:
        return False


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
    rows = np.zeros(len(candidate), np.int64)
    squares, norm, exact = 0.0, 0.0, True
    step = max(_STEP // max(candidate[:1].size, 1), 1)
    with np.errstate(all="ignore"):
        for start in range(0, len(candidate), step):
            part = slice(start, start + step)
            have, want = candidate[part], expected[part]
            exact = exact and np.array_equal(have, want.astype(have.dtype), equal_nan=True)
            have, want64 = have.astype(np.float64), want.astype(np.float64)
            same = (have == want64) | (np.isnan(have) & np.isnan(want64))
            difference = np.where(same, 0.0, have - want64)
            near = np.abs(difference) <= rounding(want, candidate.dtype)
            outside = ~(near & np.isfinite(difference)) & ~same
            rows[part] = outside.reshape(len(outside), -1).sum(axis=1)
            squares += float(np.sum(difference**2))
            norm += float(np.sum(np.where(np.isfinite(want64), want64, 0.0) ** 2))
    error = 0.0 if squares == 0 else (squares / norm) ** 0.5 if norm else np.inf
    error = float(error) if np.isfinite(error) else float("inf")
    return Difference(candidate.size, int(rows.sum()), error, rows, exact)


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
