"""A whole decode step of one row: from its embedding to the logits of the next token."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step import mosaic_gpu
from pallas_kernels.decode_step.packing import HEAD, Packed, empty_tape, places, put
from pallas_kernels.decode_step.plan import ROWS, Plan, Shape
from pallas_kernels.decode_step.reference import reference
from pallas_kernels.implementation import choose

__all__ = [
    "HEAD",
    "Packed",
    "Plan",
    "Shape",
    "decode_step",
    "empty_tape",
    "places",
    "put",
    "refusal",
]

refusal = mosaic_gpu.refusal


def decode_step(
    packed: Packed,
    plan: Plan,
    hidden: Float[Array, "D"],
    cache: Float[Array, "2L K S H"],
    position: Int[Array, ""],
    inv_freq: Float[Array, "H2"],
    *,
    attention_factor: float = 1.0,
    implementation: str = "auto",
) -> tuple[Float[Array, "V"], Float[Array, "2L K H"]]:
    """Runs one token through every layer and the head.

    Sums, norms, softmax and the residual stream are float32; keys, values, queries and
    attention weights are rounded to the cache's dtype where they enter a product. The
    cache is read only: the caller writes the new keys and values at `position`.

    Args:
        plan: how the weights in `packed` are cut and dealt out.
        hidden: the token's embedding.
        cache: keys of every layer, after rotary embedding, then values of every layer; slots
            from `position` on may hold anything, NaN included.
        position: of the token, from 0, below S.
        inv_freq: radians per position of each pair, float32.
        attention_factor: multiplies cos and sin (YaRN; 1 elsewhere).

    Returns:
        The logits, float32, and the token's keys, then values, in the cache's dtype.

    Raises:
        ValueError: shapes disagree.
        UnsupportedError: `implementation` can't serve the case.
    """
    shape = plan.shape
    expected = (2 * shape.layers, shape.kv_heads, cache.shape[2], shape.head_dim)
    if cache.shape != expected or hidden.shape != (shape.hidden,):
        raise ValueError(f"hidden {hidden.shape} and cache {cache.shape} don't fit {shape}")
    capacity, dtype = cache.shape[2], packed.tape.dtype
    why_not = refusal(plan, capacity, dtype)
    with jax.named_scope("decode_step"):
        if choose("decode_step", implementation, why_not) == "xla":
            return reference(packed, plan, hidden, cache, position, inv_freq, attention_factor)
        angles = position.astype(jnp.float32) * inv_freq
        rope = jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * attention_factor
        parts, new, *_ = mosaic_gpu.build(plan, capacity)(
            packed.tape,
            packed.bias,
            packed.norms,
            hidden.astype(jnp.float32),
            rope,
            cache,
            position[None],
        )
        head = plan.phases[HEAD]
        # A slot that no block fills holds anything.
        filled = head.fills(np.arange(head.slots)[:, None], np.arange(head.rows // ROWS))
        parts = parts[: head.slots * head.rows].reshape(*filled.shape, ROWS)
        logits = jnp.where(filled[..., None], parts, 0).sum(axis=0).reshape(-1)
        new = new.reshape(2 * shape.layers, shape.kv_heads, shape.head_dim)
        return logits, new.astype(cache.dtype)
