"""Products of many rows with one matrix of the decode step's weight stream: prefill's, and those of
steps of more rows than its kernels take."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.decode_step.packed.packing import Packed, own_outputs
from pallas_kernels.decode_step.packed.plan import DOWN, GATE_UP, StepPlan
from pallas_kernels.implementation import choose
from pallas_kernels.packed_product import mosaic_gpu
from pallas_kernels.packed_product.reference import reference

__all__ = ["packed_feed_forward", "packed_product"]


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
    padded = jnp.pad(x, ((0, 0), (0, plan.phases[phase].columns - columns)))
    found = _product(packed, plan, phase, layer, padded, result)
    own: Float[Array, "rows out"] = own_outputs(plan, phase, found)
    return own


def packed_feed_forward(
    packed: Packed,
    plan: StepPlan,
    layer: int,
    x: Float[Array, "rows D"],
    *,
    precision: lax.Precision = lax.Precision.HIGHEST,
    implementation: str = "auto",
) -> Float[Array, "rows D"]:
    """down(silu(gate(x)) * up(x)) by two `packed_product`s.

    Where pieces of the first have whole sums, its kernel makes silu(gate) * up of them in float32,
    and writes it as the second takes it: neither gate nor up is rounded or written.

    Args, raises: as of `packed_product`.
    """
    kept = jnp.dtype(x.dtype)
    why_not = (mosaic_gpu.refusal(plan, phase, layer, kept) for phase in (GATE_UP, DOWN))
    chosen = choose("packed_product", implementation, next(filter(None, why_not), None))
    if chosen == "xla" or not mosaic_gpu.gates_itself(plan, layer, len(x)):
        multiply = functools.partial(packed_product, precision=precision, implementation=chosen)
        both = multiply(packed, plan, GATE_UP, layer, x)
        gate, up = jnp.split(both, 2, axis=1)
        return multiply(packed, plan, DOWN, layer, jax.nn.silu(gate) * up)
    inputs, scales = _inputs(x, mosaic_gpu.input_dtype(plan, GATE_UP, layer))
    straight = mosaic_gpu.input_dtype(plan, DOWN, layer) == kept.name
    hidden = mosaic_gpu.gated(packed, plan, layer, inputs, scales, kept, arranged=straight)
    if straight:
        return mosaic_gpu.product(packed, plan, DOWN, layer, hidden, kept)
    return _product(packed, plan, DOWN, layer, hidden.numbers, kept)


def _product(
    packed: Packed,
    plan: StepPlan,
    phase: int,
    layer: int,
    x: Float[Array, "rows in"],
    result: jnp.dtype,
) -> Float[Array, "rows out"]:
    """By the kernel, of as many inputs and outputs as the stream has."""
    inputs, scales = _inputs(x, mosaic_gpu.input_dtype(plan, phase, layer))
    if scales is None:
        return mosaic_gpu.product(packed, plan, phase, layer, inputs, result)
    found = mosaic_gpu.product(packed, plan, phase, layer, inputs, jnp.dtype(jnp.float32))
    return (found * scales[:, None]).astype(result)


def _inputs(
    x: Float[Array, "rows in"], dtype: str
) -> tuple[mosaic_gpu.Inputs, Float[Array, " rows"] | None]:
    """x as the kernel takes it in products of a dtype, and what each row's sums are to be
    multiplied with: a power of two, if it had to be divided by one."""
    if x.dtype == dtype:
        return mosaic_gpu.Inputs(x, len(x)), None
    _, exponent = jnp.frexp(jnp.abs(x).max(axis=1))
    small = jnp.ldexp(x, -exponent[:, None]).astype(dtype)
    return mosaic_gpu.Inputs(small, len(x)), jnp.ldexp(jnp.float32(1), exponent)
