"""Grouped-query attention of one query position per row over a paged cache."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.gqa_decode_attention.reference import reference
from pallas_kernels.implementation import choose


def gqa_decode_attention(
    q: Float[Array, "B N H"],
    pages: Float[Array, "P K C H"],
    k_tables: Int[Array, "B n"],
    v_tables: Int[Array, "B n"],
    lengths: Int[Array, "B"],
    *,
    implementation: str = "auto",
) -> Float[Array, "B N H"]:
    """softmax(q k^T / sqrt(H)) v over the first `lengths[b]` slots of row b, in q's dtype.

    Query head n reads key/value head n // G. Scores and softmax are float32. The keys of slots
    j C to j C + C - 1 of row b are page `k_tables[b, j]`, their values page `v_tables[b, j]`;
    rows may share pages. Slots from `lengths[b]` on may hold anything, NaN included, and entries
    of the tables that are wholly past them may be no pages at all. `lengths` counts from 1.

    Raises:
        ValueError: shapes disagree.
        UnsupportedError: `implementation` can't serve the case.
    """
    from pallas_kernels.gqa_decode_attention import mosaic_gpu  # heavy, and only tracing needs it

    heads, dim = q.shape[1:]
    kv_heads, page = pages.shape[1:3]
    tables = k_tables.shape
    if pages.shape[3] != dim or tables != v_tables.shape or tables[0] != q.shape[0]:
        raise ValueError(
            f"q {q.shape}, pages {pages.shape}, k_tables {tables} and v_tables {v_tables.shape} "
            "disagree"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads don't divide by {kv_heads} kv heads")
    why_not = mosaic_gpu.refusal(heads, kv_heads, page, dim, q.dtype, pages.dtype)
    with jax.named_scope("gqa_decode_attention"):
        if choose("gqa_decode_attention", implementation, why_not) == "mosaic_gpu":
            return mosaic_gpu.gqa_decode_attention(q, pages, k_tables, v_tables, lengths)
        return reference(q, pages, k_tables, v_tables, lengths)
