"""The definition of correct for `gqa_prefill_attention`, in plain jnp.

The softmax is computed over blocks of slots with a running maximum (Milakov and
Gimelshein, 2018, arXiv:1805.02867), so that no T x S matrix exists and blocks past the
longest row are never read.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK = 512
"""Slots a step of the loop takes; a cache this small needs no loop at all."""

Carry = tuple[
    Float[Array, "B K G T"], Float[Array, "B K G T"], Float[Array, "B K G T H"]
]  # running maximum, sum and weighted values


def reference(
    q: Float[Array, "B T N H"],
    k_cache: Float[Array, "B K S H"],
    v_cache: Float[Array, "B K S H"],
    offsets: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B T N H"]:
    batch, steps, heads, dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    group = heads // kv_heads
    grouped = q.reshape(batch, steps, kv_heads, group, dim)
    positions = offsets[:, None] + jnp.arange(steps)  # [B, T]
    f32 = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}

    def add_block(index: Int[Array, ""] | int, carry: Carry, size: int) -> Carry:
        maximum, total, values = carry
        # The last block of a capacity that BLOCK doesn't divide starts earlier, so that it
        # stays inside the cache; its slots that an earlier block has seen are masked.
        start = jnp.minimum(index * size, capacity - size)
        slots = start + jnp.arange(size)
        fresh = (slots >= index * size) & (slots < lengths[:, None])  # [B, size]
        k = lax.dynamic_slice_in_dim(k_cache, start, size, axis=2)
        v = lax.dynamic_slice_in_dim(v_cache, start, size, axis=2)
        # 0 * NaN is NaN: a value past the row's length must not enter even with weight 0.
        v = jnp.where(fresh[:, None, :, None], v, 0)
        seen = fresh[:, None, :] & (slots <= positions[:, :, None])  # [B, T, size]
        scores = jnp.einsum("btkgh,bksh->bkgts", grouped, k, **f32) * dim**-0.5
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        # A query that has seen nothing yet has maximum -inf, and -inf - -inf is NaN.
        safe = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)
        weights = jnp.exp(scores - safe[..., None])
        scale = jnp.exp(maximum - safe)
        new_values = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v, **f32)
        return (
            new_maximum,
            total * scale + weights.sum(axis=-1),
            values * scale[..., None] + new_values,
        )

    rows = (batch, kv_heads, group, steps)
    carry: Carry = (
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, dim), jnp.float32),
    )
    if capacity <= BLOCK:
        carry = add_block(0, carry, capacity)
    else:
        blocks = (lengths.max() + BLOCK - 1) // BLOCK
        carry = lax.fori_loop(0, blocks, lambda i, c: add_block(i, c, BLOCK), carry)
    _, total, values = carry
    out = values / total[..., None]
    return jnp.moveaxis(out, 3, 1).astype(q.dtype).reshape(batch, steps, heads, dim)
