"""Products of many rows with one matrix of the decode step's weight stream: prefill's, and those of
steps of more rows than its kernels take."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.decode_step.packed.packing import Packed
from pallas_kernels.decode_step.packed.plan import StepPlan
from pallas_kernels.implementation import choose
from pallas_kernels.packed_product import mosaic_gpu
from pallas_kernels.packed_product.reference import reference

__all__ = ["packed_product"]


def packed_product(
    packed: Packed,
    plan: StepPlan,
    phase: int,
    layer: int,
    x: Float[Array, "rows in"],
    *,
    dtype: DTypeLike | None = None,
    precision: lax.Precision = lax.Precision.HIGHEST,
    implementation: str = "auto",
) -> Float[Array, "rows out"]:
    """x @ W.T, of a matrix W as `StepPlan.matrices` has them.

    Sums are float32. The kernel takes products of weights that are numbers in their own dtype; of
    blocks it makes float16 numbers, about the middle of their codes, and rounds x to float16 under
    a power of two of each row's own, so that nothing overflows. The reference makes numbers of x's
    dtype.

    Args:
        phase, layer: whose matrix; of the head the layer is 0.
        x: in bfloat16, float16 or float32.
        dtype: of the result, by default that of x.
        precision: of the reference's products.

    Raises:
        ValueError: x has another number of columns than the matrix.
        UnsupportedError: `implementation` can't serve the case.
    """
    _, columns = plan.shape.matrices[phase]
    if x.shape[1] != columns:
        raise ValueError(f"x {x.shape} has not the {columns} columns of the matrix")
    result = jnp.dtype(dtype or x.dtype)
    why_not = mosaic_gpu.refusal(plan, phase, layer, result)
    if choose("packed_product", implementation, why_not) == "xla":
        return reference(packed, plan, phase, layer, x, result, precision)
    format = jnp.dtype(mosaic_gpu.input_dtype(plan, phase, layer))
    if format == x.dtype:
        return mosaic_gpu.product(packed, plan, phase, layer, x, result)
    _, exponent = jnp.frexp(jnp.abs(x).max(axis=1, keepdims=True))
    small = jnp.ldexp(x, -exponent).astype(format)
    found = mosaic_gpu.product(packed, plan, phase, layer, small, jnp.dtype(jnp.float32))
    return lax.convert_element_type(jnp.ldexp(found, exponent), result)
