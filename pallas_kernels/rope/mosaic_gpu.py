"""`rope` as one Mosaic GPU kernel: a block turns 64 positions of one head of q or of k.

Angles, cosines and sines are XLA's, in float32: a position of 131,071 radians needs a range
reduction that the hardware's approximate sine does not do. The kernel only rotates.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat

BLOCK = 64
"""Positions of a block: the rows of a warpgroup's matrix layout."""

DTYPES = ("bfloat16", "float16")
PAIRS = (16, 32, 64)
"""Pairs that turn: half a row of shared memory has to be a swizzled tile."""


def refusal(tokens: int, dims: tuple[int, int], pairs: int, *dtypes: jnp.dtype) -> str | None:
    """Why the kernel can't rotate `tokens` = B * T positions, or None where it can."""
    for dtype in dtypes:
        if dtype.name not in DTYPES:
            return f"its kernel takes {' or '.join(DTYPES)}, not {dtype.name}"
    if pairs not in PAIRS or any(dim != dims[0] or dim % pairs for dim in dims):
        return (
            f"its kernel turns {', '.join(map(str, PAIRS))} pairs that divide one head dimension "
            f"of q and k, not {pairs} of {dims[0]} and {dims[1]}"
        )
    if tokens > 8 and tokens % 8:
        return f"its kernel takes up to 8 or a multiple of 8 positions, not {tokens}"
    return None


@functools.partial(jax.jit, static_argnames="attention_factor")
def rope(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    inv_freq: Float[Array, "R2"],
    attention_factor: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    batch, steps, heads, dim = q.shape
    tokens, kv_heads, pairs = batch * steps, k.shape[2], inv_freq.shape[0]
    angles = positions.reshape(tokens, 1).astype(jnp.float32) * inv_freq.astype(jnp.float32)
    table = jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * attention_factor  # [2, B * T, R2]
    wgmma = plgpu.Layout.WGMMA

    def body(
        q_ref: Any,
        k_ref: Any,
        table_ref: Any,
        q_out: Any,
        k_out: Any,
        q_smem: Any,
        k_smem: Any,
        table_smem: Any,
        full: Any,
    ) -> None:
        head = lax.axis_index("head")
        rows = pl.ds(lax.axis_index("block") * BLOCK, BLOCK)
        for i in range(2):
            plgpu.copy_gmem_to_smem(table_ref.at[i, rows], table_smem.at[i], full)

        def turn(x_ref: Any, x_out: Any, x_smem: Any, head: Any) -> None:
            # Positions past the last one are read as zeros, and not written.
            plgpu.copy_gmem_to_smem(x_ref.at[rows, head], x_smem, full)
            plgpu.barrier_wait(full)
            cos, sin = (compat.load(table_smem.at[i], layout=wgmma) for i in range(2))
            halves = [x_smem.at[:, pl.ds(i * pairs, pairs)] for i in range(2)]
            first, second = (compat.load(h, layout=wgmma).astype(jnp.float32) for h in halves)
            halves[0][...] = (first * cos - second * sin).astype(x_out.dtype)
            halves[1][...] = (second * cos + first * sin).astype(x_out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_smem, x_out.at[rows, head])
            plgpu.wait_smem_to_gmem(0)

        pl.when(head < heads)(lambda: turn(q_ref, q_out, q_smem, head))
        pl.when(head >= heads)(lambda: turn(k_ref, k_out, k_smem, head - heads))

    def tiled(columns: int, itemsize: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
        return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * itemsize)

    kernel = compat.kernel(
        body,
        name="rope",
        out_type=(
            jax.ShapeDtypeStruct((tokens, heads, dim), q.dtype),
            jax.ShapeDtypeStruct((tokens, kv_heads, dim), k.dtype),
        ),
        grid=(heads + kv_heads, pl.cdiv(tokens, BLOCK)),
        grid_names=("head", "block"),
        scratch_types=[
            plgpu.SMEM((BLOCK, dim), q.dtype, transforms=tiled(pairs, 2)),
            plgpu.SMEM((BLOCK, dim), k.dtype, transforms=tiled(pairs, 2)),
            plgpu.SMEM((2, BLOCK, pairs), jnp.float32, transforms=tiled(min(pairs, 32), 4)),
            plgpu.Barrier(num_arrivals=3),
        ],
    )
    q_out, k_out = kernel(q.reshape(tokens, heads, dim), k.reshape(tokens, kv_heads, dim), table)
    return q_out.reshape(q.shape), k_out.reshape(k.shape)
