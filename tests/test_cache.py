"""The paged cache: where writes go, and where they must not; a model of it in NumPy says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.config import ModelConfig
from qwen_jax.model.cache import NOBODY, PAGE, Cache, bytes_per_token, create_pages, pages_for
from tests.tiny_checkpoints import tiny_config

LAYERS, PAGES, HEADS, SLOTS, DIM = 3, 9, 2, 4, 5
ROWS, WIDTH = 3, 2
"""Pages of 4 positions here: nothing asks how many there are, and more end in the middle."""
CAPACITY = WIDTH * SLOTS

write = jax.jit(Cache.write, static_argnums=1)
write_all = jax.jit(Cache.write_all)


def drawn(rng: np.random.Generator) -> Cache:
    """Random numbers in pages that lie anywhere, each row's its own."""
    pages = rng.normal(size=(2 * LAYERS, PAGES, HEADS, SLOTS, DIM)).astype(np.float32)
    order = 1 + rng.permutation(PAGES - 1)[: ROWS * WIDTH]
    return Cache(jnp.asarray(pages), jnp.asarray(order.reshape(ROWS, WIDTH), jnp.int32))


def written(cache: Cache, new: np.ndarray, positions: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The pages once each kept token's keys, or values, `new` [2L, B, T, K, H] stand at their
    position [B, T]; a position that no table reaches is none."""
    pages, tables = np.array(cache.pages), np.asarray(cache.tables)
    for row, token in np.argwhere(kept & (positions >= 0) & (positions < CAPACITY)):
        page, slot = divmod(int(positions[row, token]), SLOTS)
        pages[:, tables[row, page], :, slot] = new[:, row, token]
    return pages


def assert_same(cache: Cache, expected: np.ndarray) -> None:
    """But for the page of nobody, which may hold anything."""
    np.testing.assert_array_equal(cache.pages[:, NOBODY + 1 :], expected[:, NOBODY + 1 :])


@given(
    seed=st.integers(0, 99),
    layer=st.integers(0, LAYERS - 1),
    tokens=st.sampled_from([1, 3, CAPACITY]),
    starts=st.lists(st.integers(-3, CAPACITY + 2), min_size=ROWS, max_size=ROWS),
    counts=st.lists(st.integers(-2, CAPACITY), min_size=ROWS, max_size=ROWS),
)
def test_writes_go_to_their_pages_or_to_nobodys(
    seed: int, layer: int, tokens: int, starts: list[int], counts: list[int]
) -> None:
    """Padding, rows that are done (they have no length), and what lies before the beginning or
    behind the capacity: never clamped, never wrapped into another row, page or layer."""
    rng = np.random.default_rng(seed)
    cache = drawn(rng)
    k, v = rng.normal(size=(2, ROWS, tokens, HEADS, DIM)).astype(np.float32)
    start, lengths = np.array(starts), np.array(starts) + counts
    positions = start[:, None] + np.arange(tokens)
    new = np.zeros((2 * LAYERS, *k.shape), np.float32)
    new[layer], new[LAYERS + layer] = k, v
    whole = written(cache, new, positions, positions < lengths[:, None])
    expected = np.array(cache.pages)
    for half in (layer, LAYERS + layer):
        expected[half] = whole[half]
    got = write(cache, layer, k, v, jnp.asarray(start), jnp.asarray(lengths))
    assert_same(got, expected)
    np.testing.assert_array_equal(got.tables, cache.tables)
    # Nobody's page is the first layer's keys' own: the other layers' are left as they were.
    np.testing.assert_array_equal(got.pages[1:, NOBODY], cache.pages[1:, NOBODY])


@given(
    seed=st.integers(0, 99),
    positions=st.lists(st.integers(-3, CAPACITY + 2), min_size=ROWS, max_size=ROWS),
    live=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS),
)
def test_one_token_of_all_layers_is_written_as_layer_by_layer(
    seed: int, positions: list[int], live: list[bool]
) -> None:
    rng = np.random.default_rng(seed)
    cache = drawn(rng)
    new = rng.normal(size=(2 * LAYERS, ROWS, HEADS, DIM)).astype(np.float32)
    at, alive = jnp.asarray(positions), jnp.asarray(live)
    got = write_all(cache, new, at, alive)
    expected = written(
        cache, new[:, :, None], np.array(positions)[:, None], np.array(live)[:, None]
    )
    assert_same(got, expected)
    one_by_one = cache
    for i in range(LAYERS):
        k, v = (jnp.asarray(new[j][:, None]) for j in (i, LAYERS + i))
        one_by_one = write(one_by_one, i, k, v, at, jnp.where(alive, at + 1, 0))
    assert_same(got, np.asarray(one_by_one.pages))


def test_rows_of_one_text_are_written_side_by_side() -> None:
    """Pieces of a text in one call: two rows with one table, the second from the next page on."""
    rng = np.random.default_rng(0)
    cache = drawn(rng)
    both = dataclasses.replace(cache, tables=cache.tables[jnp.array([1, 1])])
    k, v = rng.normal(size=(2, 1, CAPACITY, HEADS, DIM)).astype(np.float32)
    one = dataclasses.replace(cache, tables=cache.tables[1:2])
    expected = write(one, 1, k, v, jnp.array([0]), jnp.array([CAPACITY - 1]))
    halves = (x.reshape(2, SLOTS, HEADS, DIM) for x in (k, v))
    got = write(both, 1, *halves, jnp.array([0, SLOTS]), jnp.array([SLOTS, CAPACITY - 1]))
    assert_same(got, np.asarray(expected.pages))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_layer_is_read_and_put_in_its_place(layer: int) -> None:
    rng = np.random.default_rng(layer)
    cache = drawn(rng)
    pages, tables = np.array(cache.pages), np.asarray(cache.tables)
    for half, got in zip((layer, LAYERS + layer), cache.layer(layer), strict=True):
        for row in range(ROWS):
            shown = np.concatenate([pages[half, page] for page in tables[row]], axis=1)
            np.testing.assert_array_equal(got[row], shown)
    k, v = rng.normal(size=(2, ROWS, HEADS, CAPACITY, DIM)).astype(np.float32)
    other = cache.with_layer(layer, k, v)
    for half, new in ((layer, k), (LAYERS + layer, v)):
        for row in range(ROWS):
            for j, page in enumerate(tables[row]):
                pages[half, page] = new[row, :, j * SLOTS : (j + 1) * SLOTS]
    np.testing.assert_array_equal(other.pages, pages)
    for got, new in zip(other.layer(layer), (k, v), strict=True):
        np.testing.assert_array_equal(got, new)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_where_a_layer_lies_in_the_flat_pool(layer: int) -> None:
    cache = drawn(np.random.default_rng(0))
    keys, values = cache.layer_tables(layer)
    np.testing.assert_array_equal(cache.flat[keys], cache.pages[layer][cache.tables])
    np.testing.assert_array_equal(cache.flat[values], cache.pages[LAYERS + layer][cache.tables])


def test_writes_take_the_caches_dtype() -> None:
    config = tiny_config(num_layers=1, num_kv_heads=1, num_heads=1, head_dim=2)
    cache = Cache.create(config, 1, 4, jnp.dtype(jnp.bfloat16))
    new = jnp.full((1, 1, 1, 2), 257.0)
    got = write(cache, 0, new, new, jnp.array([2]), jnp.array([3]))
    assert got.pages.dtype == jnp.bfloat16
    keys, values = got.layer(0)
    for x in (keys, values):
        np.testing.assert_array_equal(x[0, 0, :4, 0].astype(jnp.float32), [0, 0, 256, 0])


@pytest.mark.parametrize(("capacity", "each"), [(1, 1), (128, 1), (129, 2), (300, 3)])
def test_create(capacity: int, each: int) -> None:
    """Every row has pages of its own, none of them nobody's."""
    config = tiny_config(num_layers=3)
    cache = Cache.create(config, 5, capacity, jnp.dtype(jnp.float16))
    assert pages_for(capacity) == each and cache.capacity == each * PAGE >= capacity
    assert sorted(np.asarray(cache.tables).ravel()) == list(range(1, 1 + 5 * each))
    shape = (6, 1 + 5 * each, config.num_kv_heads, PAGE, config.head_dim)
    assert cache.pages.shape == shape
    assert cache.pages.dtype == jnp.float16 and not cache.pages.any()


@given(positions=st.integers(0, 10_000))
def test_pages_hold_their_positions_and_no_page_more(positions: int) -> None:
    assert (pages_for(positions) - 1) * PAGE < positions <= pages_for(positions) * PAGE or (
        positions == pages_for(positions) == 0
    )


@pytest.mark.parametrize("itemsize", [2, 4])
def test_bytes_per_token_is_what_a_position_takes(itemsize: int) -> None:
    config = tiny_config()
    dtype = jnp.dtype({2: "bfloat16", 4: "float32"}[itemsize])
    assert bytes_per_token(config, itemsize) == create_pages(config, 3, dtype).nbytes / (3 * PAGE)


def test_bytes_of_qwen_at_32k_positions() -> None:
    """0.5B in 16 bits: 201 MB for the keys and as much for the values."""
    config = ModelConfig(24, 896, 14, 2, 64, 4864, 151_936, 32768, 1e6, 1e-6, True)
    assert bytes_per_token(config, 2) * 32768 == 2 * 201_326_592
