"""Causal grouped-query attention of a chunk of a prompt over a paged cache that holds it too."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.gqa_prefill_attention.reference import reference
from pallas_kernels.implementation import choose


def gqa_prefill_attention(
    q: Float[Array, "B T N H"],
    pages: Float[Array, "P K C H"],
    k_tables: Int[Array, "B n"],
    v_tables: Int[Array, "B n"],
    offsets: Int[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v where query t of row b stands at position offsets[b] + t.

    It sees slots s <= offsets[b] + t with s < lengths[b]. Query head n reads key/value head
    n // G. Scores and softmax are float32, the result has q's dtype. The keys of slots j C to
    j C + C - 1 of row b are page `k_tables[b, j]`, their values page `v_tables[b, j]`; rows may
    share pages, as chunks of one prompt do. Slots from `lengths[b]` on may hold anything, NaN
    included, and entries of the tables that are wholly past them may be no pages at all; queries
    past a row's length return finite nonsense. `lengths` counts from 1.

    Raises:
        ValueError: shapes disagree.
        UnsupportedError: `implementation` can't serve the case.
    """
    from pallas_kernels.gqa_prefill_attention import mosaic_gpu  # heavy, and only tracing needs it

    heads, dim = q.shape[2:]
    kv_heads, tables = pages.shape[1], k_tables.shape
    if pages.shape[3] != dim or tables != v_tables.shape or tables[0] != q.shape[0]:
        raise ValueError(
            f"q {q.shape}, pages {pages.shape}, k_tables {tables} and v_tables {v_tables.shape} "
            "disagree"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads don't divide by {kv_heads} kv heads")
    why_not = mosaic_gpu.refusal(q.shape, pages.shape, q.dtype, pages.dtype)
    with jax.named_scope("gqa_prefill_attention"):
        if choose("gqa_prefill_attention", implementation, why_not) == "mosaic_gpu":
            return mosaic_gpu.gqa_prefill_attention(q, pages, k_tables, v_tables, offsets, lengths)
        return reference(q, pages, k_tables, v_tables, offsets, lengths)
