"""The definition of correct, in plain jnp."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.decode_step.packed.packing import Packed
from pallas_kernels.decode_step.packed.plan import StepPlan


def reference(
    packed: Packed,
    plan: StepPlan,
    phase: int,
    layer: int,
    x: Float[Array, "rows in"],
    dtype: jnp.dtype,
    precision: lax.Precision,
) -> Float[Array, "rows out"]:
    weights = packed.matrix(plan, phase, layer).astype(x.dtype)
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, weights, contract, precision, preferred_element_type=dtype)
