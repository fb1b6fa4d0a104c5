"""A whole decode step of up to 64 rows: from embeddings to the logits of the next tokens."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step import kernels, unpack
from pallas_kernels.decode_step.batched.exchange import MOST_ROWS
from pallas_kernels.decode_step.packing import Packed, empty_tape, places, put
from pallas_kernels.decode_step.plan import HEAD, Plan, Shape
from pallas_kernels.decode_step.reference import reference
from pallas_kernels.implementation import choose

__all__ = [
    "HEAD",
    "MOST_ROWS",
    "Packed",
    "Plan",
    "Shape",
    "decode_step",
    "empty_tape",
    "places",
    "put",
    "refusal",
    "unpacked",
]


def refusal(plan: Plan, rows: int, dtype: DTypeLike, pairs: int) -> str | None:
    """Why no kernel can run a step that rotates so many pairs of every head, or None."""
    if 2 * pairs != plan.shape.head_dim:
        return f"it rotates whole heads, not {2 * pairs} of {plan.shape.head_dim} dimensions"
    return kernels.refusal(plan, rows, dtype)


def unpacked(
    packed: Packed, plan: Plan, phase: int, layer: int = 0, *, implementation: str = "auto"
) -> Float[Array, "rows columns"]:
    """A matrix read back from the tape, `[out, in]`; the same numbers either way.

    Raises:
        UnsupportedError: `implementation` can't serve the case.
    """
    why_not = unpack.refusal(packed.tape.dtype)
    if choose("decode_step", implementation, why_not) == "xla":
        return packed.matrix(plan, phase, layer)
    return unpack.matrix(packed, plan, phase, layer)


def decode_step(
    packed: Packed,
    plan: Plan,
    hidden: Float[Array, "B D"],
    cache: Float[Array, "2L B K S H"],
    position: Int[Array, "B"],
    inv_freq: Float[Array, "R2"],
    *,
    attention_factor: float = 1.0,
    implementation: str = "auto",
) -> tuple[Float[Array, "B V"], Float[Array, "2L B K H"]]:
    """Runs one token of every row through every layer and the head.

    There are two kernels. Up to 16 rows of 0.5B, 9 of 1.5B, 7 of 3B and 4 of 7B run on one that
    keeps the whole input of a product in shared memory, up to 64 rows on one that lets it stream.

    Sums, norms, softmax and the residual stream are float32; keys, values, queries and
    attention weights are rounded to the cache's dtype where they enter a product, as all inputs of
    products are in the kernel of many rows. The cache is read only: the caller writes the new keys
    and values at `position`.

    Args:
        plan: how the weights in `packed` are cut and dealt out.
        hidden: the tokens' embeddings.
        cache: keys of every layer, after rotary embedding, then values of every layer; slots
            from a row's `position` on may hold anything, NaN included.
        position: of each row's token, from 0, below S.
        inv_freq: radians per position of each pair, float32.
        attention_factor: multiplies cos and sin (YaRN; 1 elsewhere).

    Returns:
        The logits, float32, and the tokens' keys, then values, in the cache's dtype.

    Raises:
        ValueError: shapes or dtypes disagree.
        UnsupportedError: `implementation` can't serve the case.
    """
    shape, rows = plan.shape, hidden.shape[0]
    capacity, dtype = cache.shape[3], packed.tape.dtype
    expected = (2 * shape.layers, rows, shape.kv_heads, capacity, shape.head_dim)
    if cache.shape != expected or hidden.shape != (rows, shape.hidden):
        raise ValueError(f"hidden {hidden.shape} and cache {cache.shape} don't fit {shape}")
    if cache.dtype != dtype:
        raise ValueError(f"the cache is {cache.dtype}, the weights are {dtype}")
    why_not = refusal(plan, rows, dtype, inv_freq.shape[0])
    with jax.named_scope("decode_step"):
        if choose("decode_step", implementation, why_not) == "xla":
            return reference(packed, plan, hidden, cache, position, inv_freq, attention_factor)
        angles = position[:, None].astype(jnp.float32) * inv_freq
        rope = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1) * attention_factor
        logits, new, _ = kernels.build(plan, rows, capacity, dtype)(
            packed.tape,
            plan.table(),
            packed.bias,
            packed.norms,
            hidden.astype(jnp.float32),
            rope,
            cache,
            position,
        )
        return logits, new
