"""Grouped-query attention of one query position per row over a cache."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.gqa_decode_attention import mosaic_gpu
from pallas_kernels.gqa_decode_attention.reference import reference
from pallas_kernels.implementation import choose


def gqa_decode_attention(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "B K S H"],
    v_cache: Float[Array, "B K S H"],
    lengths: Int[Array, "B"],
    *,
    implementation: str = "auto",
) -> Float[Array, "B N H"]:
    """softmax(q k^T / sqrt(H)) v over the first `lengths[b]` slots of row b, in q's dtype.

    Query head n reads key/value head n // G. Scores and softmax are float32. Slots from
    `lengths[b]` on may hold anything, NaN included. `lengths` counts from 1.

    Raises:
        ValueError: shapes disagree.
        UnsupportedError: `implementation` can't serve the case.
    """
    if k_cache.shape != v_cache.shape or k_cache.shape[::3] != q.shape[::2]:
        raise ValueError(f"q {q.shape}, k {k_cache.shape} and v {v_cache.shape} disagree")
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads don't divide by {k_cache.shape[1]} kv heads")
    heads, dim = q.shape[1:]
    kv_heads, capacity = k_cache.shape[1:3]
    why_not = mosaic_gpu.refusal(
        heads, kv_heads, capacity, dim, q.dtype, k_cache.dtype, v_cache.dtype
    )
    with jax.named_scope("gqa_decode_attention"):
        if choose("gqa_decode_attention", implementation, why_not) == "mosaic_gpu":
            return mosaic_gpu.gqa_decode_attention(q, k_cache, v_cache, lengths)
        return reference(q, k_cache, v_cache, lengths)
