"""Matrices of the decode step's weight stream, as the decoder multiplies with them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels.decode_step import Packed, StepPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix of the weight stream, as `qwen_jax.model.products.Matrix`."""

    packed: Packed
    plan: StepPlan = dataclasses.field(metadata={"static": True})
    phase: int = dataclasses.field(metadata={"static": True})
    layer: int = dataclasses.field(metadata={"static": True})
    implementation: str = dataclasses.field(metadata={"static": True})

    def __getitem__(self, rows: Any) -> "PackedMatrix":
        """Itself, for `...`: rows are looked up by `engine.weights.PackedWeights`."""
        assert rows is ...
        return self

    def product(
        self, x: Float[Array, "*rows in"], precision: lax.Precision, dtype: jnp.dtype
    ) -> Float[Array, "*rows out"]:
        """x @ self.T."""
        found = pallas_kernels.packed_product(
            self.packed,
            self.plan,
            self.phase,
            self.layer,
            x.reshape(-1, x.shape[-1]),
            dtype=dtype,
            precision=precision,
            implementation=self.implementation,
        )
        return found.reshape(*x.shape[:-1], -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedGateUp(PackedMatrix):
    """Gate and up, as `qwen_jax.model.products.FeedForward`."""

    def feed_forward(
        self, x: Float[Array, "*rows D"], precision: lax.Precision
    ) -> Float[Array, "*rows D"]:
        """down(silu(gate(x)) * up(x))."""
        found = pallas_kernels.packed_feed_forward(
            self.packed,
            self.plan,
            self.layer,
            x.reshape(-1, x.shape[-1]),
            precision=precision,
            implementation=self.implementation,
        )
        return found.reshape(x.shape)
