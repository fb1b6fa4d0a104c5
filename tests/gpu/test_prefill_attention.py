"""The prefill kernel against NumPy float64, beside the XLA reference's own error.

One shape is compiled once and run on many inputs: lengths and offsets are data.
"""

import dataclasses
import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests.engines import relative
from tests.kernels.paging import paged

SEED = secrets.randbits(32)


@dataclasses.dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    steps: int
    capacity: int  # rounded up to whole pages
    rows: int = 1
    dtype: str = "bfloat16"
    page: int = 128
    entries: int = 0  # of a table, at least


@dataclasses.dataclass(frozen=True)
class Input:
    """Rows end at `lengths` and their queries start at `offsets` (None: they end there too)."""

    lengths: tuple[int, ...]
    offsets: tuple[int, ...] | None = None
    scale: float = 1.0  # of q and k
    key_bias: float = 0.0


@functools.cache
def compiled(implementation: str):
    return jax.jit(
        functools.partial(pallas_kernels.gqa_prefill_attention, implementation=implementation)
    )


@dataclasses.dataclass(frozen=True)
class Drawn:
    q: np.ndarray
    k: np.ndarray  # [B, K, S, H], which the operation sees in pages
    v: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    page: int
    entries: int
    poison: float = np.nan
    order: int = 0  # of the pages, a seed

    def cache(self) -> tuple[np.ndarray, ...]:
        order = SEED + self.order
        return paged(self.k, self.v, self.lengths, self.page, order, self.poison, self.entries)

    def run(self, implementation: str) -> np.ndarray:
        arguments = (self.q, *self.cache(), self.offsets, self.lengths)
        return np.asarray(compiled(implementation)(*arguments))

    def expected(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The queries of a row that mean something, and their attention in float64."""
        steps, heads, dim = self.q.shape[1:]
        length, group = self.lengths[row], heads // self.k.shape[1]
        positions = self.offsets[row] + np.arange(steps)
        real = positions < length
        k, v = (x[row, :, :length].astype(np.float64) for x in (self.k, self.v))
        q = self.q[row, real].astype(np.float64) / np.sqrt(dim)
        out = np.empty_like(q)
        for head in range(heads):
            scores = q[:, head] @ k[head // group].T
            scores[np.arange(length) > positions[real, None]] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights @ v[head // group] / weights.sum(axis=1, keepdims=True)
        return real, out


def draw(shape: Shape, given: Input) -> Drawn:
    rng = np.random.default_rng(SEED)

    def normal(*size: int) -> np.ndarray:
        return rng.normal(size=size, scale=given.scale)

    cache = (shape.rows, shape.kv_heads, shape.capacity, shape.dim)
    q = normal(shape.rows, shape.steps, shape.heads, shape.dim)
    k, v = normal(*cache), rng.normal(size=cache)
    k += given.key_bias * rng.choice([-1, 1], (1, shape.kv_heads, 1, shape.dim))
    lengths = np.resize(np.array(given.lengths, np.int32), shape.rows)
    offsets = np.maximum(lengths - shape.steps, 0)
    if given.offsets is not None:
        offsets = np.resize(np.array(given.offsets, np.int32), shape.rows)
    for row, length in enumerate(lengths):
        k[row, :, length:] = np.nan
        v[row, :, length:] = np.nan
    q, k, v = (np.array(jnp.asarray(x, shape.dtype)) for x in (q, k, v))
    return Drawn(q, k, v, offsets, lengths, shape.page, shape.entries)


def check(shape: Shape, given: Input) -> None:
    check_drawn(draw(shape, given))


def check_drawn(drawn: Drawn) -> None:
    ours, xla = drawn.run("mosaic_gpu"), drawn.run("xla")
    assert ours.dtype == drawn.q.dtype
    assert np.isfinite(ours.astype(np.float32)).all(), "queries past a row's length are finite too"
    for row in range(len(drawn.lengths)):
        real, expected = drawn.expected(row)
        if not real.any():
            continue
        error, reference_error = (relative(x[row, real], expected) for x in (ours, xla))
        print(f"row {row}: error {error:.2e}, the XLA reference's {reference_error:.2e} ({SEED=})")
        assert error <= 2 * reference_error, f"{row=} {SEED=}"


SIZES = {
    "0.5b": Shape(14, 2, 64, steps=512, capacity=2048),
    "1.5b": Shape(12, 2, 128, steps=512, capacity=2048),
    "3b": Shape(16, 2, 128, steps=256, capacity=1024),
    "7b": Shape(28, 4, 128, steps=512, capacity=8192),
    "14b": Shape(40, 8, 128, steps=512, capacity=1024),
    "72b": Shape(64, 8, 128, steps=128, capacity=512),
}


@pytest.mark.parametrize("size", SIZES)
def test_chunks_of_every_size(size):
    shape = SIZES[size]
    check(shape, Input(lengths=(shape.capacity,)))
    check(shape, Input(lengths=(shape.steps,)))
    check(shape, Input(lengths=(shape.capacity - 77,)))


ROWS = {
    "0.5b": Shape(14, 2, 64, steps=64, capacity=1024, rows=4),
    "0.5b f16": Shape(14, 2, 64, steps=128, capacity=1024, rows=4, dtype="float16"),
    "7b": Shape(28, 4, 128, steps=64, capacity=1024, rows=4),
    "7b f16": Shape(28, 4, 128, steps=128, capacity=1024, rows=4, dtype="float16"),
    "16 queries": Shape(14, 2, 64, steps=16, capacity=512, rows=4),
    "16 of 128": Shape(10, 2, 128, steps=16, capacity=512, rows=4),
    "32 queries": Shape(28, 4, 128, steps=32, capacity=512, rows=4),
    "odd capacity": Shape(12, 2, 128, steps=16, capacity=528, rows=4),
    "larger pages": Shape(12, 2, 128, steps=64, capacity=1152, rows=4, page=384),
    "one head": Shape(3, 3, 64, steps=128, capacity=640, rows=4),
    "large table": Shape(14, 2, 64, steps=128, capacity=1024, rows=4, entries=256),
    "7b's large table": Shape(28, 4, 128, steps=128, capacity=1024, rows=4, entries=256),
    "a single row": Shape(14, 2, 64, steps=128, capacity=1024, entries=256),
}

INPUTS = {
    "one token": Input(lengths=(1,), offsets=(0,)),
    "short rows": Input(lengths=(1, 2, 15, 16), offsets=(0,)),
    "tiles and blocks end elsewhere": Input(lengths=(63, 65, 127, 129), offsets=(0, 1, 100, 65)),
    "a second chunk": Input(lengths=(256, 200, 129, 257), offsets=(128,)),
    "rows that ended in an earlier chunk": Input(lengths=(3, 300, 128, 129), offsets=(128,)),
    "full": Input(lengths=(512,)),
    "nearly full": Input(lengths=(511, 449, 385, 510)),
    "scores of a thousand": Input(lengths=(512, 300, 129, 100), scale=30),
    "key biases": Input(lengths=(512, 300, 129, 100), key_bias=150),
}


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("shape", ROWS)
def test_awkward_rows(shape, given):
    check(ROWS[shape], INPUTS[given])


@pytest.mark.parametrize("shape", ["odd capacity", "larger pages", "one head"])
def test_length_is_the_capacity(shape):
    check(ROWS[shape], Input(lengths=(ROWS[shape].capacity,)))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_unused_slots_may_hold_anything(poison):
    drawn = draw(ROWS["7b"], Input(lengths=(300, 64, 129, 1)))
    for cache in (drawn.k, drawn.v):
        for row, length in enumerate(drawn.lengths):
            cache[row, :, length:] = 0
    clean = dataclasses.replace(drawn, poison=0).run("mosaic_gpu")
    for cache in (drawn.k, drawn.v):
        for row, length in enumerate(drawn.lengths):
            cache[row, :, length:] = poison
    dirty = dataclasses.replace(drawn, poison=poison).run("mosaic_gpu")
    np.testing.assert_array_equal(dirty, clean)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("size", ["0.5b", "7b"])
def test_chunks_of_one_text(size, rows):
    """As the engine calls it: the whole context's table, rows one after the other in a text."""
    shape = dataclasses.replace(SIZES[size], steps=128, capacity=3200, rows=rows, entries=256)
    length = 1000 + 128 * rows - 50  # the last row ends within its chunk
    drawn = draw(shape, Input(lengths=(length,)))
    k, v = (np.repeat(x[:1], rows, axis=0) for x in (drawn.k, drawn.v))
    offsets = (1000 + 128 * np.arange(rows)).astype(np.int32)
    drawn = dataclasses.replace(drawn, k=k, v=v, offsets=offsets)
    needed = -(-length // shape.page)
    k_tables = drawn.cache()[1]
    assert (k_tables[:, :needed] == k_tables[0, :needed]).all()
    check_drawn(drawn)


@pytest.mark.parametrize("shape", ["0.5b", "large table", "7b"])
def test_a_row_does_not_depend_on_the_others(shape):
    drawn = draw(ROWS[shape], Input(lengths=(512, 300, 129, 700)))
    alone = drawn.run("mosaic_gpu")[1]
    k, v = (np.array(jnp.nan_to_num(x)) for x in (drawn.k, drawn.v))
    lengths = np.array([1, 300, 1024, 65], np.int32)
    offsets = np.array([0, drawn.offsets[1], 896, 64], np.int32)
    others = dataclasses.replace(drawn, k=k, v=v, lengths=lengths, offsets=offsets, order=1)
    np.testing.assert_array_equal(others.run("mosaic_gpu")[1], alone)


@pytest.mark.parametrize("size", ["0.5b", "7b"])
def test_repeats_bit_for_bit(size):
    drawn = draw(SIZES[size], Input(lengths=(SIZES[size].capacity - 3,)))
    first = drawn.run("mosaic_gpu")
    for _ in range(5):
        np.testing.assert_array_equal(drawn.run("mosaic_gpu"), first)
