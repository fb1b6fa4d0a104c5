"""Registers and memory inside the decode-step kernel: layouts and loads."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.decode_step.plan import ROWS

MATRIX = plgpu.Layout.WGMMA
ALONG_ROWS = MATRIX.reduce(1)  # one number a row
ALONG_COLUMNS = MATRIX.reduce(0)  # one number a column


def strided(width: int) -> Any:
    return plgpu.Layout.WG_STRIDED((width,), vec_size=1)


def gmem(ref: Any, layout: Any) -> jax.Array:
    """A plain load: what other blocks wrote must not come through the copy engine."""
    return compat.load(ref, layout=layout, optimized=False)


def rows_of(value: jax.Array, columns: int) -> jax.Array:
    """`[64]` to `[64, columns]`, the same in every column."""
    return lax.broadcast_in_dim(value, (ROWS, columns), (0,))


def columns_of(value: jax.Array) -> jax.Array:
    """`[n]` to `[64, n]`, the same in every row."""
    return lax.broadcast_in_dim(value, (ROWS, value.shape[0]), (1,))


def rounded(value: jax.Array) -> jax.Array:
    """Through bfloat16, as the cache and the matrix units hold it."""
    return value.astype(jnp.bfloat16).astype(jnp.float32)
