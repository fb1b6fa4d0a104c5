"""The definition of correct for `gqa_decode_attention`, in plain jnp."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def reference(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "B K S H"],
    v_cache: Float[Array, "B K S H"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B N H"]:
    batch, heads, dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    valid = jnp.arange(capacity) < lengths[:, None, None, None]  # [B, 1, 1, S]
    f32 = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    scores = jnp.einsum("bkgh,bksh->bkgs", grouped, k_cache, **f32) * dim**-0.5
    scores = jnp.where(valid, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    # 0 * NaN is NaN: a value past the row's length must not enter even with weight 0.
    values = jnp.where(valid.reshape(batch, 1, capacity, 1), v_cache, 0)
    out = jnp.einsum("bkgs,bksh->bkgh", weights.astype(v_cache.dtype), values, **f32)
    # Normalising after the product keeps the sum in float32, whatever the cache's dtype.
    return (out / weights.sum(axis=-1)[..., None]).astype(q.dtype).reshape(batch, heads, dim)
