"""The definition of correct for `gqa_decode_attention`, in plain jnp."""

from jaxtyping import Array, Float, Int

from pallas_kernels.gqa_prefill_attention.reference import reference as prefill_reference


def reference(
    q: Float[Array, "B N H"],
    pages: Float[Array, "P K C H"],
    k_tables: Int[Array, "B n"],
    v_tables: Int[Array, "B n"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B N H"]:
    """Prefill of one query, which stands at the row's last position."""
    return prefill_reference(q[:, None], pages, k_tables, v_tables, lengths - 1, lengths)[:, 0]
