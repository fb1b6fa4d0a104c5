"""The definition of correct for `gqa_prefill_attention`, in plain jnp.

A loop gathers some pages of every row a turn and keeps a running softmax (Milakov and Gimelshein,
2018, arXiv:1805.02867), so that no T x S matrix exists and what no query sees is never read: a
short text costs little whatever the tables' size.

A turn past what a row's queries see leaves that row's numbers as they are, bit for bit: its
weights are exp(-inf) = 0, and what was there is multiplied by exp(0) = 1.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

SLOTS = 128
"""Slots of every row that a turn takes, rounded up to whole pages. Measured on two cores in float32
at the shape of 0.5B: 256 take twice as long for texts of 100 and as long for 500 and 2,000, 128
queries or one."""

Carry = tuple[
    Float[Array, "B K G T"], Float[Array, "B K G T"], Float[Array, "B K G T H"]
]  # running maximum, sum and weighted values


def reference(
    q: Float[Array, "B T N H"],
    pages: Float[Array, "P K C H"],
    k_tables: Int[Array, "B n"],
    v_tables: Int[Array, "B n"],
    offsets: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B T N H"]:
    batch, steps, heads, dim = q.shape
    kv_heads, page = pages.shape[1:3]
    group, entries = heads // kv_heads, k_tables.shape[1]
    taken = min(-(-SLOTS // page), entries)  # entries of a table a turn
    size = taken * page
    grouped = q.reshape(batch, steps, kv_heads, group, dim)
    positions = offsets[:, None] + jnp.arange(steps)  # [B, T]
    ends = jnp.minimum(jnp.minimum(lengths, offsets + steps), entries * page)  # [B]
    f32 = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}

    def gather(tables: Int[Array, "B n"], turn: Int[Array, ""]) -> Float[Array, "B K size H"]:
        # Past the last entry, and where an entry is no page, some other page: none is seen.
        numbers = jnp.take(tables, turn * taken + jnp.arange(taken), axis=1, mode="clip")
        some = jnp.take(pages, numbers, axis=0, mode="clip")  # [B, taken, K, C, H]
        return some.swapaxes(1, 2).reshape(batch, kv_heads, size, dim)

    def add(turn: Int[Array, ""], carry: Carry) -> Carry:
        maximum, total, values = carry
        slots = turn * size + jnp.arange(size)
        real = slots < ends[:, None]  # [B, size]
        k, v = gather(k_tables, turn), gather(v_tables, turn)
        # 0 * NaN is NaN: a value past the row's end must not enter even with weight 0.
        v = jnp.where(real[:, None, :, None], v, 0)
        seen = real[:, None, :] & (slots <= positions[:, :, None])  # [B, T, size]
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
    start: Carry = (
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, dim), jnp.float32),
    )
    if entries == taken:  # without a loop it has a derivative, too
        _, total, values = add(jnp.int32(0), start)
    else:
        turns = (ends.max() + size - 1) // size
        _, total, values = lax.fori_loop(0, turns, add, start)
    out = values / total[..., None]
    return jnp.moveaxis(out, 3, 1).astype(q.dtype).reshape(batch, steps, heads, dim)
