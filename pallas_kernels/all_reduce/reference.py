"""The definition of correct for `all_reduce`: XLA's own."""

import jax
from jax import lax
from jaxtyping import Array, Float


def reference(x: Float[Array, "B D"], axis: str) -> Float[Array, "B D"]:
    summed: jax.Array = lax.psum(x, axis)
    return summed
