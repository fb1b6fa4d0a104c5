"""The definition of correct, in plain jnp."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.decode_step.packed.packing import Packed
from pallas_kernels.decode_step.packed.plan import StepPlan


def reference(
    packed: Packed, plan: StepPlan, phase: int, layer: int, x: Float[Array, "rows in"],
    dtype: jnp.dtype,
) -> Float[Array, "rows out"]:  # fmt: skip
    weights = packed.matrix(plan, phase, layer).astype(x.dtype)
    return lax.dot_general(x, weights, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
