"""Products of activations and linear weights, which are arrays or forms of their own.

Shape letters as in `decoder`.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from qwen_jax.model.split import Whole


def activation_dtype(parameters: jnp.dtype) -> jnp.dtype:
    """Of activations: the parameters' own, but float32 under float16 ones (see `matmul`)."""
    return jnp.dtype(jnp.float32 if parameters == jnp.float16 else parameters)


class Matrix(Protocol):
    """A linear weight in a form of its own, in place of an array: see `engine.blocks` and
    `engine.weights`.

    As of an array, `[...]` is all of it, and `[tokens]` are some of its rows.
    """

    def product(
        self, x: Float[Array, "*rows in"], precision: lax.Precision, dtype: jnp.dtype
    ) -> Float[Array, "*rows out"]:
        """x @ self.T, accumulated in float32 and returned in `dtype`."""


@runtime_checkable
class FeedForward(Protocol):
    """A `Matrix` of gate and up that knows down as well."""

    def feed_forward(
        self, x: Float[Array, "*rows D"], precision: lax.Precision
    ) -> Float[Array, "*rows D"]:
        """down(silu(gate(x)) * up(x)), whose inside nobody sees."""


def matmul(
    x: Float[Array, "*rows in"],
    weight: Float[Array, "out in"] | Matrix,
    precision: lax.Precision,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "*rows out"]:
    """x @ weight.T, accumulated in float32 and returned in `dtype`, by default x's.

    float16 weights meet float32 activations. Large activations of Qwen2.5 overflow float16,
    so each row is divided by a power of two, which is exact, before it is converted.
    """
    dtype = dtype or x.dtype
    if not isinstance(weight, jax.Array):
        return weight.product(x, precision, dtype)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    if weight.dtype != jnp.float16:
        return lax.dot_general(x, weight, contract, precision, preferred_element_type=dtype)
    _, exponent = jnp.frexp(jnp.abs(x).max(axis=-1, keepdims=True))
    small = jnp.ldexp(x, -exponent).astype(jnp.float16)
    out = lax.dot_general(small, weight, contract, precision, preferred_element_type=jnp.float32)
    return jnp.ldexp(out, exponent)


def summed_matmul(
    x: Float[Array, "B T in"],
    weight: Float[Array, "out in"] | Matrix,
    precision: lax.Precision,
    split: Whole,
) -> Float[Array, "B T out"]:
    """x @ weight.T where each device of a mesh has some of the inputs."""

    def own(x: Float[Array, "B T in"], weight: Float[Array, "out in"]) -> Float[Array, "B T out"]:
        return split.sum(matmul(x, weight, precision))

    return split.over(own, (2, 1), None)(x, weight)
