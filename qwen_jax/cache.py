"""The functional key/value cache: an immutable pytree of one K and one V array a layer."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qwen_jax.config import ModelConfig

AXES = ("rows", "kv_heads", None, None)
"""Logical axis names of each layer's `[B, K, S, H]` arrays."""

SMALLEST_CAPACITY = 256
"""Every cache the engine makes holds a power of two slots, and at least so many."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after rotary embedding) and values of every layer, each `[B, K, S, H]`."""

    k: tuple[Float[Array, "B K S H"], ...]
    v: tuple[Float[Array, "B K S H"], ...]

    @classmethod
    def create(cls, config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype) -> "KVCache":
        shape = (rows, config.num_kv_heads, capacity, config.head_dim)
        layers = range(config.num_layers)
        return cls(
            k=tuple(jnp.zeros(shape, dtype) for _ in layers),
            v=tuple(jnp.zeros(shape, dtype) for _ in layers),
        )

    @property
    def rows(self) -> int:
        return self.k[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.k[0].shape[2]


def bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Bytes of cache one token takes, K and V of all layers counted."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def write(
    cache: Float[Array, "B K S H"], new: Float[Array, "B T K H"], positions: Int[Array, "B"]
) -> Float[Array, "B K S H"]:
    """Puts `new[b]` into the T slots from `positions[b]` on.

    A row whose slots don't all lie inside the cache is dropped, never clamped: XLA's
    dynamic_update_slice would overwrite the last slots instead.
    """
    rows = jnp.arange(cache.shape[0], dtype=positions.dtype)
    return lax.scatter(
        cache,
        jnp.stack([rows, positions], axis=1),
        new.swapaxes(1, 2).astype(cache.dtype),
        lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3),
            inserted_window_dims=(0,),
            scatter_dims_to_operand_dims=(0, 2),
        ),
        indices_are_sorted=True,
        unique_indices=True,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )
