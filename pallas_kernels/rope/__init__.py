"""Rotary position embedding of queries and keys."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.implementation import choose
from pallas_kernels.rope.reference import reference


def rope(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    inv_freq: Float[Array, "R2"],
    *,
    attention_factor: float = 1.0,
    implementation: str = "auto",
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    """Rotates q and k by their positions, half-split pairing (Su et al., 2021, arXiv:2104.09864).

    Dimension i < R/2 pairs with i + R/2; dimensions from R = 2 * R2 on pass unchanged, so
    the rotary dimension may be smaller than H. Angles, cosines and the rotation itself are
    float32; the results have the dtypes of q and k.

    Args:
        positions: 0-based position of each token.
        inv_freq: radians per position of each pair, float32.
        attention_factor: multiplies cos and sin (YaRN; 1 elsewhere).

    Raises:
        ValueError: shapes disagree.
        UnsupportedError: `implementation` can't serve the case.
    """
    from pallas_kernels.rope import mosaic_gpu  # heavy, and only tracing needs it

    if q.shape[:2] != positions.shape or k.shape[:2] != positions.shape:
        raise ValueError(f"q {q.shape}, k {k.shape} and positions {positions.shape} disagree")
    if 2 * inv_freq.shape[0] > min(q.shape[-1], k.shape[-1]):
        raise ValueError(f"{inv_freq.shape[0]} frequencies need more than {q.shape[-1]} dimensions")
    dims = (q.shape[-1], k.shape[-1])
    why_not = mosaic_gpu.refusal(positions.size, dims, inv_freq.shape[0], q.dtype, k.dtype)
    with jax.named_scope("rope"):
        if choose("rope", implementation, why_not) == "mosaic_gpu":
            return mosaic_gpu.rope(q, k, positions, inv_freq, attention_factor)
        return reference(q, k, positions, inv_freq, attention_factor)
