"""The decode kernel against NumPy float64, beside the XLA reference's own error.

One shape is compiled once and run on many inputs: lengths are data.
"""

import dataclasses
import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.gqa_decode_attention.mosaic_gpu import Config, gqa_decode_attention
from tests.engines import relative
from tests.kernels.paging import paged
from tests.kernels.sizes import HEADS

SEED = secrets.randbits(32)


@dataclasses.dataclass(frozen=True)
class Shape:
    size: str
    rows: int
    capacity: int  # rounded up to whole pages
    dtype: str = "bfloat16"
    page: int = 128


@dataclasses.dataclass(frozen=True)
class Input:
    """Rows of these lengths (repeated); q and k are scaled, and k has one bias per dimension."""

    lengths: tuple[int, ...]
    scale: float = 1.0
    key_bias: float = 0.0
    poison: float = np.nan


@functools.cache
def compiled(implementation: str):
    return jax.jit(
        functools.partial(pallas_kernels.gqa_decode_attention, implementation=implementation)
    )


@dataclasses.dataclass(frozen=True)
class Drawn:
    q: np.ndarray
    k: np.ndarray  # [B, K, S, H], which the operation sees in pages
    v: np.ndarray
    lengths: np.ndarray
    page: int
    order: int = 0  # of the pages, a seed

    def arguments(self) -> tuple[np.ndarray, ...]:
        cache = paged(self.k, self.v, self.lengths, self.page, SEED + self.order)
        return self.q, *cache, self.lengths

    def run(self, implementation: str) -> np.ndarray:
        return np.asarray(compiled(implementation)(*self.arguments()))

    def expected(self, row: int) -> np.ndarray:
        """[N, H] float64, over the slots that the row holds and no others."""
        length = int(self.lengths[row])
        q = np.asarray(self.q[row]).astype(np.float64)
        k, v = (np.asarray(x[row, :, :length]).astype(np.float64) for x in (self.k, self.v))
        group = q.shape[0] // k.shape[0]
        scores = np.einsum("kgh,ksh->kgs", q.reshape(k.shape[0], group, -1), k) / q.shape[1] ** 0.5
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        values = np.einsum("kgs,ksh->kgh", weights, v) / weights.sum(axis=-1, keepdims=True)
        return values.reshape(q.shape)


def draw(shape: Shape, given: Input) -> Drawn:
    rng = np.random.default_rng(SEED)
    heads, kv_heads, dim = HEADS[shape.size]
    q = rng.standard_normal((shape.rows, heads, dim), np.float32) * given.scale
    cache = (shape.rows, kv_heads, shape.capacity, dim)
    k, v = (rng.standard_normal(cache, np.float32) for _ in "kv")
    k = k * given.scale + given.key_bias * rng.choice([-1, 1], (1, kv_heads, 1, dim))
    lengths = np.minimum(np.resize(np.array(given.lengths, np.int32), shape.rows), shape.capacity)
    for row, length in enumerate(lengths):
        k[row, :, length:] = given.poison
        v[row, :, length:] = given.poison
    return Drawn(*(x.astype(shape.dtype) for x in (q, k, v)), lengths, shape.page)


def check(shape: Shape, given: Input) -> None:
    check_drawn(draw(shape, given))


def check_drawn(drawn: Drawn) -> None:
    ours, xla = drawn.run("mosaic_gpu"), drawn.run("xla")
    assert ours.dtype == drawn.q.dtype
    for row, length in enumerate(drawn.lengths):
        expected = drawn.expected(row)
        error, reference_error = relative(ours[row], expected), relative(xla[row], expected)
        print(
            f"{drawn.q.shape} {drawn.q.dtype} length {length}: "
            f"error {error:.2e}, the XLA reference's {reference_error:.2e} ({SEED=})"
        )
        assert error <= 2 * reference_error, f"{row=} {SEED=}"


SHAPES = [
    Shape("0.5b", 8, 1024),
    Shape("0.5b", 1, 32768),
    Shape("0.5b", 3, 1000, "float16"),
    Shape("1.5b", 2, 2048),
    Shape("3b", 3, 512, "float16"),
    Shape("7b", 2, 4096),
    Shape("14b", 5, 256),
    Shape("72b", 40, 128),
    Shape("0.5b", 4, 2000, page=384),
    Shape("7b", 3, 1024, page=256),
    # So many that none is split.
    Shape("0.5b", 140, 512),
    Shape("7b", 70, 384, "float16"),
]
WIDE = Shape("1.5b", 4, 512)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestShapes:
    """Rows that end in the middle of a tile, at its edges, at the capacity, after one slot."""

    def test_rows_of_different_lengths(self, shape):
        full = shape.capacity
        check(shape, Input((full, 1, full - 1, full // 2 + 1, full // 3, 65, 128, 129)))

    def test_one_slot_in_a_large_cache(self, shape):
        check(shape, Input((1,)))

    def test_edges_of_pages(self, shape):
        page = shape.page
        check(shape, Input((page, page + 1, page - 1, 2 * page, 2 * page + 1)))

    def test_random_lengths(self, shape):
        rng = np.random.default_rng(SEED + 1)
        check(shape, Input(tuple(rng.integers(1, shape.capacity + 1, shape.rows).tolist())))


LENGTHS = (512, 1, 300, 129)


class TestInputs:
    def test_scores_to_a_thousand(self):
        drawn = draw(WIDE, given := Input(LENGTHS, scale=16))
        scores = np.einsum("kgh,ksh->kgs", *(np.asarray(x[0], np.float64) for x in group(drawn)))
        assert 800 < np.abs(scores).max() / 128**0.5 < 3000
        check(WIDE, given)

    def test_key_biases_of_real_checkpoints(self):
        check(WIDE, Input(LENGTHS, key_bias=150))

    @pytest.mark.parametrize("poison", [np.inf, -np.inf, 3e38])
    def test_slots_past_the_length_may_hold_anything(self, poison):
        check(WIDE, Input(LENGTHS, poison=poison))

    @pytest.mark.parametrize("shape", [WIDE, SHAPES[1]], ids=str)
    def test_repeats_bit_for_bit(self, shape):
        drawn = draw(shape, Input((shape.capacity - 3, 100)))
        first = drawn.run("mosaic_gpu")
        for _ in range(20):
            np.testing.assert_array_equal(first, drawn.run("mosaic_gpu"))

    def test_a_row_does_not_depend_on_the_others(self):
        drawn = draw(WIDE, Input(LENGTHS))
        alone = drawn.run("mosaic_gpu")[2]
        k, v = (np.array(jnp.nan_to_num(x)) for x in (drawn.k, drawn.v))
        moved = dataclasses.replace(drawn, k=k, v=v, lengths=np.array([7, 512, 300, 1], np.int32))
        np.testing.assert_array_equal(alone, moved.run("mosaic_gpu")[2])

    def test_where_the_pages_lie_changes_nothing(self):
        drawn = draw(WIDE, Input(LENGTHS))
        moved = dataclasses.replace(drawn, order=1)
        np.testing.assert_array_equal(drawn.run("mosaic_gpu"), moved.run("mosaic_gpu"))

    def test_rows_that_share_pages(self):
        """All begin alike, and two are the same text."""
        drawn = draw(WIDE, Input((512, 400, 300, 300)))
        for cache in (drawn.k, drawn.v):
            cache[1:3, :, :256] = cache[0, :, :256]
            cache[3] = cache[2]
        k_tables = drawn.arguments()[2]
        assert (k_tables[:, :2] == k_tables[0, :2]).all() and k_tables[2, 2] == k_tables[3, 2]
        check_drawn(drawn)

    @pytest.mark.parametrize("size", ["0.5b", "1.5b"])
    @pytest.mark.parametrize(("tile", "blocks_per_sm"), [(128, 2), (128, 1), (192, 1), (256, 1)])
    def test_other_tiles(self, size, tile, blocks_per_sm):
        """Sums in another order, and nothing else: rounded to bfloat16 from float32."""
        drawn = draw(Shape(size, 3, 1000, page=768), Input((1000, 257, 63)))
        ring = max(2, 3 * 128 * 64 // tile // drawn.q.shape[-1])
        config = Config(tile, ring, blocks_per_sm)
        if config.smem(drawn.q.shape[-1]) > config.room:
            pytest.skip(f"{config} needs more shared memory than a block has")
        ours = np.asarray(gqa_decode_attention(*drawn.arguments(), config=config))
        xla = drawn.run("xla")
        for row in range(3):
            expected = drawn.expected(row)
            assert relative(ours[row], expected) <= 2 * relative(xla[row], expected)

    @pytest.mark.parametrize("rows", [4, 140])
    def test_a_row_of_no_length_is_zeros(self, rows):
        ours = draw(dataclasses.replace(WIDE, rows=rows), Input((0, 300))).run("mosaic_gpu")
        assert (ours[0] == 0).all() and np.isfinite(ours).all() and ours[1].any()

    def test_auto_takes_the_kernel(self):
        drawn = draw(WIDE, Input(LENGTHS))
        np.testing.assert_array_equal(drawn.run("auto"), drawn.run("mosaic_gpu"))
        assert pallas_kernels.choose("gqa_decode_attention", "auto") == "mosaic_gpu"


def group(drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    kv_heads, dim = drawn.k.shape[1], drawn.k.shape[3]
    return drawn.q.reshape(drawn.q.shape[0], kv_heads, -1, dim), drawn.k
