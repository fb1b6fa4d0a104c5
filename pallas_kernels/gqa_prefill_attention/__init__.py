"""Causal grouped-query attention of a chunk of a prompt over a cache that already holds it."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.gqa_prefill_attention import mosaic_gpu
from pallas_kernels.gqa_prefill_attention.reference import reference
from pallas_kernels.implementation import choose


def gqa_prefill_attention(
    q: Float[Array, "B T N H"],
    k_cache: Float[Array, "B K S H"],
    v_cache: Float[Array, "B K S H"],
    offsets: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v where query t of row b stands at position offsets[b] + t.

    It sees slots s <= offsets[b] + t with s < lengths[b]. Query head n reads key/value head
    n // G. Scores and softmax are float32, the result has q's dtype. Slots from `lengths[b]`
    on may hold anything, NaN included; queries past a row's length return finite nonsense.
    `lengths` counts from 1.

    Raises:
        ValueError: shapes disagree.
        UnsupportedError: `implementation` can't serve the case.
    """
    if k_cache.shape != v_cache.shape or k_cache.shape[::3] != q.shape[::3]:
        raise ValueError(f"q {q.shape}, k {k_cache.shape} and v {v_cache.shape} disagree")
    if q.shape[2] % k_cache.shape[1]:
        raise ValueError(f"{q.shape[2]} query heads don't divide by {k_cache.shape[1]} kv heads")
    why_not = mosaic_gpu.refusal(q.shape, k_cache.shape, q.dtype, k_cache.dtype, v_cache.dtype)
    with jax.named_scope("gqa_prefill_attention"):
        if choose("gqa_prefill_attention", implementation, why_not) == "mosaic_gpu":
            return mosaic_gpu.gqa_prefill_attention(q, k_cache, v_cache, offsets, lengths)
        return reference(q, k_cache, v_cache, offsets, lengths)
