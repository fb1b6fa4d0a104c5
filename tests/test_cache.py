"""The key/value cache: where writes go, and where they must not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.config import ModelConfig
from qwen_jax.model.cache import KVCache, StackedCache, bytes_per_token, write
from tests.tiny_checkpoints import tiny_config

CAPACITY = 9
jitted = jax.jit(write)


@given(
    steps=st.integers(1, CAPACITY),
    positions=st.lists(st.integers(-3, CAPACITY + 2), min_size=3, max_size=3),
)
def test_writes_go_to_their_slots_or_nowhere(steps: int, positions: list[int]) -> None:
    """A row that would leave the cache, at either end, is dropped whole: never clamped, wrapped."""
    rng = np.random.default_rng(0)
    cache = rng.normal(size=(3, 2, CAPACITY, 4)).astype(np.float32)
    new = rng.normal(size=(3, steps, 2, 4)).astype(np.float32)
    expected = cache.copy()
    for row, position in enumerate(positions):
        if 0 <= position <= CAPACITY - steps:
            expected[row, :, position : position + steps] = new[row].swapaxes(0, 1)
    got = jitted(jnp.asarray(cache), jnp.asarray(new), jnp.asarray(positions, jnp.int32))
    np.testing.assert_array_equal(got, expected)


@given(
    layer=st.integers(0, 2),
    steps=st.integers(1, CAPACITY),
    positions=st.lists(st.integers(-3, CAPACITY + 2), min_size=3, max_size=3),
)
def test_one_array_of_all_layers_is_written_alike(
    layer: int, steps: int, positions: list[int]
) -> None:
    """No row that is dropped lands in another row or layer."""
    rng = np.random.default_rng(0)
    stacked = StackedCache(jnp.asarray(rng.normal(size=(6, 3, 2, CAPACITY, 4)), jnp.float32))
    apart = KVCache(tuple(stacked.k), tuple(stacked.v))
    k, v = (jnp.asarray(rng.normal(size=(3, steps, 2, 4)), jnp.float32) for _ in "kv")
    at = jnp.asarray(positions, jnp.int32)
    one, other = stacked.write(layer, k, v, at), apart.write(layer, k, v, at)
    for i in range(3):
        for ours, theirs in zip(one.layer(i), other.layer(i), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@given(positions=st.lists(st.integers(-3, CAPACITY + 2), min_size=3, max_size=3))
def test_all_layers_at_once_are_written_as_one_by_one(positions: list[int]) -> None:
    rng = np.random.default_rng(0)
    stacked = StackedCache(jnp.asarray(rng.normal(size=(6, 3, 2, CAPACITY, 4)), jnp.float32))
    new = jnp.asarray(rng.normal(size=(6, 3, 2, 4)), jnp.float32)
    at = jnp.asarray(positions, jnp.int32)
    expected = stacked
    for i in range(3):
        expected = expected.write(i, new[i][:, None], new[3 + i][:, None], at)
    np.testing.assert_array_equal(stacked.write_all(new, at).layers, expected.layers)


@pytest.mark.parametrize("layer", range(3))
def test_a_layer_is_put_in_its_place(layer: int) -> None:
    rng = np.random.default_rng(0)
    stacked = StackedCache(jnp.asarray(rng.normal(size=(6, 1, 2, 3, 4)), jnp.float32))
    k, v = (jnp.asarray(rng.normal(size=(1, 2, 3, 4)), jnp.float32) for _ in "kv")
    expected = np.array(stacked.layers)
    expected[layer], expected[3 + layer] = k, v
    apart = KVCache(tuple(stacked.k), tuple(stacked.v)).with_layer(layer, k, v)
    np.testing.assert_array_equal(stacked.with_layer(layer, k, v).layers, expected)
    np.testing.assert_array_equal([*apart.k, *apart.v], expected)


def test_writes_take_the_caches_dtype() -> None:
    cache = jnp.zeros((1, 1, 4, 2), jnp.bfloat16)
    got = jitted(cache, jnp.full((1, 1, 1, 2), 257.0), jnp.array([2]))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[0, 0, :, 0].astype(jnp.float32), [0, 0, 256, 0])


def test_create() -> None:
    config = tiny_config(num_layers=3)
    cache = KVCache.create(config, 5, 7, jnp.dtype(jnp.float16))
    assert (cache.rows, cache.capacity) == (5, 7)
    assert len(cache.k) == len(cache.v) == 3
    for x in jax.tree.leaves(cache):
        assert x.shape == (5, config.num_kv_heads, 7, config.head_dim)
        assert x.dtype == jnp.float16 and not x.any()


@pytest.mark.parametrize("itemsize", [2, 4])
def test_bytes_per_token_is_what_a_slot_takes(itemsize: int) -> None:
    config = tiny_config()
    dtype = jnp.dtype({2: "bfloat16", 4: "float32"}[itemsize])
    cache = KVCache.create(config, 1, 10, dtype)
    held = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert bytes_per_token(config, itemsize) == held / 10


def test_bytes_of_qwen_at_32k_positions() -> None:
    """0.5B in 16 bits: 201 MB for the keys and as much for the values."""
    config = ModelConfig(24, 896, 14, 2, 64, 4864, 151_936, 32768, 1e6, 1e-6, True)
    assert bytes_per_token(config, 2) * 32768 == 2 * 201_326_592
