"""Rounding to a narrower format, in NumPy and under JAX, and the unit roundoffs."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Float

Array = Any

UNIT = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "tf32": 2.0**-11,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""Unit roundoff: the largest relative error of rounding to nearest."""

SMALLEST = 2.0**-24
"""The spacing of float16's smallest numbers, which are no finer for being small."""


def round_to(x: Array, dtype: str | None, xp: Any) -> Array:
    """`x`, in its own dtype, rounded to nearest even as `dtype` holds it; None rounds nothing."""
    if dtype is None:
        return x
    if dtype == "tf32":
        return _tf32(x, xp)
    if xp is jnp:
        # The barrier keeps XLA from dropping a conversion there and back as excess precision.
        return lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)
    if dtype == "float16":
        return _float16(x)
    with np.errstate(over="ignore"):
        return x.astype(_DTYPES[dtype]).astype(x.dtype)


def _float16(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """NumPy converts what is no normal number of float16 at 70 ns a value, the others at 3; below
    2^-14 float16 has the multiples of 2^-24."""
    small = np.abs(x) < 2.0**-14
    with np.errstate(over="ignore"):
        rest = np.where(small, x.dtype.type(0), x).astype(np.float16).astype(x.dtype)
        return np.where(small, np.rint(x * 2.0**24) * 2.0**-24, rest).astype(x.dtype)


def round_interval(
    value: Float[np.ndarray, "..."], limit: Float[np.ndarray, "..."], dtype: str
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """What is known to within `limit`, rounded, and how far it then may be: rounding is monotonic,
    so it maps an interval to one."""
    low, middle, high = (round_to(v, dtype, np) for v in (value - limit, value, value + limit))
    with np.errstate(invalid="ignore"):
        width = np.maximum(high - middle, middle - low)
    return middle, np.where(np.isnan(width), 0, width)


_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def _tf32(x: Array, xp: Any) -> Array:
    """float32 with 10 bits after the point: the operands of NVIDIA's tensor cores."""
    if xp is jnp:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)
    bits = x.astype(np.float32).view(np.uint32)
    even = (bits >> np.uint32(13)) & np.uint32(1)
    kept = (bits + np.uint32(0xFFF) + even) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), kept.view(np.float32), x).astype(x.dtype)
