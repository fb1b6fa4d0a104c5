"""The functional key/value cache: an immutable pytree of one K and one V array a layer, or of one
array of them all, as the decode-step kernel takes it."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qwen_jax.config import ModelConfig

AXES = ("rows", "kv_heads", None, None)
"""Logical axis names of each layer's `[B, K, S, H]` arrays."""

Keys = Float[Array, "B K S H"]
New = Float[Array, "B T K H"]
Layer = tuple[Keys, Keys]
"""A layer's keys and values."""

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

    def layer(self, i: int) -> Layer:
        return self.k[i], self.v[i]

    def write(self, i: int, k: New, v: New, positions: Int[Array, "B"]) -> "KVCache":
        """With a layer's keys and values of T tokens, as `write` puts them in."""
        keys, values = self.layer(i)
        return self.with_layer(i, write(keys, k, positions), write(values, v, positions))

    def with_layer(self, i: int, k: Keys, v: Keys) -> "KVCache":
        return KVCache(_replaced(self.k, i, k), _replaced(self.v, i, v))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedCache:
    """The keys of every layer, then the values, in one array."""

    layers: Float[Array, "2L B K S H"]

    @classmethod
    def create(
        cls, config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype
    ) -> "StackedCache":
        shape = (2 * config.num_layers, rows, config.num_kv_heads, capacity, config.head_dim)
        return cls(jnp.zeros(shape, dtype))

    @property
    def k(self) -> Float[Array, "L B K S H"]:
        return self.layers[: len(self.layers) // 2]

    @property
    def v(self) -> Float[Array, "L B K S H"]:
        return self.layers[len(self.layers) // 2 :]

    @property
    def rows(self) -> int:
        return self.layers.shape[1]

    @property
    def capacity(self) -> int:
        return self.layers.shape[3]

    def layer(self, i: int) -> Layer:
        """Slices, which kernels read where they lie (with JAX 0.10 XLA copies them first)."""
        keys, values = self._places(i)
        return self.layers[keys], self.layers[values]

    def _places(self, i: int) -> tuple[int, int]:
        """Of a layer's keys and of its values."""
        return i, len(self.layers) // 2 + i

    def write(self, i: int, k: New, v: New, positions: Int[Array, "B"]) -> "StackedCache":
        """With a layer's keys and values of T tokens, as `write` puts them in."""
        rows = self.layers.reshape(-1, *self.layers.shape[2:])
        for at, new in zip(self._places(i), (k, v), strict=True):
            rows = write(rows, new, positions, at * self.rows)
        return StackedCache(rows.reshape(self.layers.shape))

    def write_all(
        self, new: Float[Array, "2L B K H"], positions: Int[Array, "B"]
    ) -> "StackedCache":
        """With one token's keys and values of every layer, as `write` puts them in."""
        rows = self.layers.reshape(-1, *self.layers.shape[2:])
        new = new.reshape(-1, 1, *new.shape[2:])
        rows = write(rows, new, jnp.tile(positions, len(self.layers)))
        return StackedCache(rows.reshape(self.layers.shape))

    def with_layer(self, i: int, k: Keys, v: Keys) -> "StackedCache":
        keys, values = self._places(i)
        return StackedCache(self.layers.at[keys].set(k).at[values].set(v))


Cache = KVCache | StackedCache


def _replaced(layers: tuple[Keys, ...], i: int, new: Keys) -> tuple[Keys, ...]:
    return (*layers[:i], new, *layers[i + 1 :])


def bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Bytes of cache one token takes, K and V of all layers counted."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def write(
    cache: Float[Array, "R K S H"], new: New, positions: Int[Array, "B"], first: int = 0
) -> Float[Array, "R K S H"]:
    """Puts `new[b]` into the T slots from `positions[b]` on, of row `first + b`.

    A row whose slots don't all lie inside the cache is dropped, never clamped: XLA's
    dynamic_update_slice would overwrite the last slots instead.
    """
    rows = first + jnp.arange(new.shape[0], dtype=positions.dtype)
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
