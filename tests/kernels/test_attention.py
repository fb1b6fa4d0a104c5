"""Decode and prefill attention against NumPy float64, for every implementation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.gqa_prefill_attention.reference import SLOTS
from tests.engines import relative
from tests.kernels.paging import Paged, paged
from tests.numpy_reference import attention

# One compilation a case, as in the model, instead of one an operation.
decode_attention = jax.jit(pallas_kernels.gqa_decode_attention, static_argnames="implementation")
prefill_attention = jax.jit(pallas_kernels.gqa_prefill_attention, static_argnames="implementation")
IMPLEMENTATIONS = ["xla"]
EPS = float(np.finfo(np.float32).eps)


def bound(dim: int, slots: int) -> float:
    """Relative error of float32 attention over standard normal q, k and v.

    A sum of n terms of random sign has partial sums that grow as sqrt(i / n); each of its n
    roundings adds eps / 2 / sqrt(3) of one, together eps / 2 * sqrt(n / 6). A score sums H
    products, and its error (it is of order 1) becomes its weight's relative error through exp.
    Numerator and denominator sum S terms each. Scale, maximum, exp, products and the division
    are 4 roundings more.
    """
    return ((dim / 6) ** 0.5 + 2 * (slots / 6) ** 0.5 + 4) * EPS / 2


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of `lengths` slots in n pages; the last T of them are the queries."""

    heads: int
    kv_heads: int
    dim: int
    page: int
    entries: int
    lengths: tuple[int, ...]
    steps: int = 1

    def draw(self, seed: int = 0, poison: float = np.nan, dtype: str = "float32") -> "Drawn":
        rng = np.random.default_rng(seed)
        rows = len(self.lengths)

        def normal(*shape: int) -> np.ndarray:
            return np.array(jnp.asarray(rng.normal(size=shape), dtype))

        q = normal(rows, self.steps, self.heads, self.dim)
        slots = self.page * self.entries
        k, v = (normal(rows, self.kv_heads, slots, self.dim) for _ in "kv")
        for row, length in enumerate(self.lengths):
            k[row, :, length:] = poison
            v[row, :, length:] = poison
        lengths = np.array(self.lengths, np.int32)
        offsets = np.maximum(lengths - self.steps, 0)
        return Drawn(q, k, v, offsets, lengths, self.page, poison)


@dataclasses.dataclass(frozen=True)
class Drawn:
    q: np.ndarray
    k: np.ndarray  # [B, K, S, H], which the operations see in pages
    v: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    page: int
    poison: float
    order: int = 0  # of the pages, a seed

    def cache(self) -> Paged:
        return paged(self.k, self.v, self.lengths, self.page, self.order, self.poison)

    def of_rows(self, rows: list[int]) -> "Drawn":
        names = ("q", "k", "v", "offsets", "lengths")
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in names})

    def expected(self) -> np.ndarray:
        """[B, T, N, H] float64; NaN where a query stands past its row's length."""
        rows, steps = self.q.shape[:2]
        out = np.full(self.q.shape, np.nan)
        for row in range(rows):
            positions = self.offsets[row] + np.arange(steps)
            real = positions < self.lengths[row]
            slots = np.arange(self.k.shape[2])
            visible = slots <= positions[real, None]
            q, k, v = (x[row].astype(np.float64) for x in (self.q, self.k, self.v))
            out[row, real] = attention(q[real], k, v, visible)
        return out

    def decode(self, implementation: str) -> np.ndarray:
        out = decode_attention(
            self.q[:, 0], *self.cache(), self.lengths, implementation=implementation
        )
        return np.asarray(out)[:, None]

    def prefill(self, implementation: str) -> np.ndarray:
        return np.asarray(
            prefill_attention(
                self.q, *self.cache(), self.offsets, self.lengths, implementation=implementation
            )
        )


def assert_close(case: Case, ours: np.ndarray, drawn: Drawn) -> None:
    assert np.isfinite(ours).all(), "queries past a row's length too are finite"
    expected = drawn.expected()
    for row in range(len(case.lengths)):
        real = ~np.isnan(expected[row, :, 0, 0])
        error = relative(ours[row, real], expected[row, real])
        assert error <= bound(case.dim, case.lengths[row]), f"row {row}: {error:.2e}"


DECODE = [
    Case(1, 1, 2, 1, 1, (1,)),
    Case(6, 2, 32, 7, 1, (7, 1, 4)),
    Case(14, 2, 64, 128, 256, (1,)),
    Case(14, 2, 64, 64, 4, (255, 256, 1, 77)),
    Case(5, 5, 10, 3, 11, (32,)),
    Case(12, 1, 96, 16, SLOTS // 16, (SLOTS, SLOTS - 1)),
    Case(6, 3, 128, SLOTS + 1, 2, (SLOTS, SLOTS + 1, 2, SLOTS + 2)),
    Case(4, 2, 8, 128, 13, (1500, 1, 511, 512, 513, 1025, 128, 129)),
    Case(4, 2, 8, 100, 5, (500, 201, 300)),  # turns of two pages: the third has one
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestDecodeAttention:
    @pytest.mark.parametrize("case", DECODE, ids=str)
    def test_equals_float64(self, implementation, case):
        drawn = case.draw()
        assert_close(case, drawn.decode(implementation), drawn)

    def test_query_head_reads_its_own_group(self, implementation):
        """Values are their head's number: heads 0, 1, 2 read 0 and 3, 4, 5 read 1 (n // G)."""
        drawn = Case(6, 2, 4, 3, 3, (5,)).draw()
        drawn.v[0, :, :5] = np.arange(2)[:, None, None]
        out = drawn.decode(implementation)[0, 0]
        np.testing.assert_allclose(out, np.repeat([0, 1], 3)[:, None] * np.ones(4), atol=2 * EPS)

    def test_one_slot_is_returned_as_it_is(self, implementation):
        drawn = Case(6, 2, 32, 8, 5, (1,)).draw()
        expected = np.repeat(drawn.v[0, :, 0], 3, axis=0)
        np.testing.assert_array_equal(drawn.decode(implementation)[0, 0], expected)

    def test_scores_that_would_overflow_exp(self, implementation):
        """Scores of several hundred, as the k biases of real checkpoints make."""
        case = Case(6, 2, 32, 8, 5, (33, 40))
        drawn = case.draw()
        large = dataclasses.replace(drawn, q=drawn.q * 100)
        ours, expected = large.decode(implementation), large.expected()
        # The scores' absolute error grows with them: a hundred times the bound.
        assert np.isfinite(ours).all()
        assert relative(ours, expected) <= 100 * bound(32, 40)

    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
    def test_unused_slots_may_hold_anything(self, implementation, poison):
        case = Case(6, 2, 32, 60, 10, (300, 1, 599))
        clean, dirty = case.draw(poison=0), case.draw(poison=poison)
        np.testing.assert_array_equal(dirty.decode(implementation), clean.decode(implementation))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_cache(self, implementation, dtype):
        """Scores and sums are float32: the weights and the result are rounded, nothing else."""
        case = Case(6, 2, 32, 64, 4, (256, 100))
        drawn = case.draw(dtype=dtype)
        ours = drawn.decode(implementation)
        assert ours.dtype == drawn.q.dtype
        assert relative(ours, drawn.expected()) <= float(jnp.finfo(dtype).eps) / 2

    def test_repeats_bit_for_bit(self, implementation):
        drawn = DECODE[3].draw()
        np.testing.assert_array_equal(drawn.decode(implementation), drawn.decode(implementation))


PREFILL = [
    Case(1, 1, 2, 1, 1, (1,)),
    Case(6, 2, 32, 8, 2, (16, 1, 7), steps=16),
    Case(6, 2, 32, 16, 4, (64, 17, 20), steps=17),
    Case(5, 5, 10, 3, 11, (32,), steps=3),
    Case(14, 2, 64, 128, 256, (100, 256), steps=64),
    Case(4, 1, 8, 128, SLOTS // 128, (SLOTS,), steps=SLOTS),
    Case(4, 2, 8, SLOTS + 1, 2, (SLOTS + 1, SLOTS, 3, SLOTS + 2), steps=5),
    Case(4, 2, 8, 100, 11, (1100, 1024, 1025, 1), steps=9),
    Case(6, 2, 16, 128, 12, (1500, 600), steps=512),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestPrefillAttention:
    @pytest.mark.parametrize("case", PREFILL, ids=str)
    def test_equals_float64(self, implementation, case):
        drawn = case.draw()
        assert_close(case, drawn.prefill(implementation), drawn)

    @pytest.mark.parametrize("entries", [3, 20])
    def test_padding_after_a_row_that_ended_earlier(self, implementation, entries):
        """Offsets past a row's length: a short prompt in a batch whose longest goes on."""
        case = Case(6, 2, 32, 16, entries, (3, 24), steps=8)
        drawn = dataclasses.replace(case.draw(), offsets=np.array([16, 16], np.int32))
        ours = drawn.prefill(implementation)
        assert np.isfinite(ours).all()
        assert relative(ours[1], drawn.expected()[1]) <= bound(32, 24)

    def test_first_query_sees_one_slot(self, implementation):
        drawn = Case(6, 2, 32, 128, 5, (9,), steps=9).draw()
        expected = np.repeat(drawn.v[0, :, 0], 3, axis=0)
        np.testing.assert_allclose(drawn.prefill(implementation)[0, 0], expected, rtol=2 * EPS)

    @pytest.mark.parametrize("case", DECODE, ids=str)
    def test_one_query_equals_decoding(self, implementation, case):
        drawn = case.draw()
        error = relative(drawn.prefill(implementation), drawn.decode(implementation))
        assert error <= bound(case.dim, max(case.lengths))

    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
    def test_unused_slots_may_hold_anything(self, implementation, poison):
        case = Case(6, 2, 32, 60, 10, (300, 9, 599), steps=9)
        clean, dirty = case.draw(poison=0), case.draw(poison=poison)
        np.testing.assert_array_equal(dirty.prefill(implementation), clean.prefill(implementation))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_cache(self, implementation, dtype):
        case = Case(6, 2, 32, 100, 11, (1100, 100), steps=20)
        drawn = case.draw(dtype=dtype)
        ours = drawn.prefill(implementation)
        assert ours.dtype == drawn.q.dtype
        assert relative(ours, drawn.expected()) <= float(jnp.finfo(dtype).eps) / 2

    def test_repeats_bit_for_bit(self, implementation):
        drawn = PREFILL[7].draw()
        np.testing.assert_array_equal(drawn.prefill(implementation), drawn.prefill(implementation))

    def test_rows_that_are_chunks_of_one_text(self, implementation):
        """Four rows over the same pages, one after the other, are one row of all their queries."""
        whole = Case(6, 2, 32, 64, 8, (500,), steps=64).draw()
        together = dataclasses.replace(whole.of_rows([0] * 4), offsets=np.arange(4) * 64 + 200)
        q = np.random.default_rng(1).normal(size=(4, 64, 6, 32)).astype(np.float32)
        together = dataclasses.replace(together, q=q)
        cache = together.cache()
        assert (cache.k_tables == cache.k_tables[0]).all()
        ours = together.prefill(implementation).reshape(1, 256, 6, 32)
        one = dataclasses.replace(whole, q=q.reshape(1, 256, 6, 32), offsets=np.array([200]))
        assert relative(ours, one.expected()) <= bound(32, 500)

    def test_slots_that_no_query_sees_change_nothing(self, implementation):
        """A chunk in the middle of a text whose later slots are there, or not yet."""
        drawn = Case(6, 2, 32, 60, 10, (590, 300), steps=9).draw()
        early = dataclasses.replace(drawn, offsets=np.array([100, 40]))
        cut = dataclasses.replace(early, lengths=early.offsets + 9)
        np.testing.assert_array_equal(early.prefill(implementation), cut.prefill(implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", ["decode", "prefill"])
class TestOneRowsBits:
    """They depend on its own text alone."""

    def draw(self, operation: str, dtype: str) -> Drawn:
        steps = 1 if operation == "decode" else 16
        return Case(14, 2, 64, 128, 16, (100, 300, 2000), steps).draw(dtype=dtype)

    def test_not_on_where_its_pages_lie(self, operation, dtype, implementation):
        drawn = self.draw(operation, dtype)
        first, second = (
            getattr(dataclasses.replace(drawn, order=i), operation)(implementation) for i in (0, 1)
        )
        np.testing.assert_array_equal(first, second)

    def test_not_on_what_its_neighbours_hold(self, operation, dtype, implementation):
        """Beside short ones the loop ends where the row does; beside long ones it goes on."""
        drawn = self.draw(operation, dtype)
        for row in (0, 1):
            among = getattr(drawn, operation)(implementation)[row]
            alike = getattr(drawn.of_rows([row] * 3), operation)(implementation)
            for same in alike:
                np.testing.assert_array_equal(among, same)

    def test_not_on_pages_it_shares(self, operation, dtype, implementation):
        drawn = self.draw(operation, dtype)
        shared = dataclasses.replace(drawn, k=drawn.k.copy(), v=drawn.v.copy())
        for cache in (shared.k, shared.v):
            cache[1, :, :256] = cache[2, :, :256]
        tables = shared.cache().k_tables
        assert (tables[1, :2] == tables[2, :2]).all()
        beside, alone = shared, shared.of_rows([1] * 3)
        beside, alone = (getattr(x, operation)(implementation) for x in (beside, alone))
        np.testing.assert_array_equal(beside[1], alone[1])

    def test_not_on_how_many_they_are(self, operation, dtype, implementation):
        """From three on; XLA sums fewer rows' weights in another order, in float32."""
        drawn = self.draw(operation, dtype)
        together = getattr(drawn, operation)(implementation)
        for row in range(3):
            for rows in (5, 8):
                alike = getattr(drawn.of_rows([row] * rows), operation)(implementation)
                np.testing.assert_array_equal(together[row], alike[-1])


def test_shapes_that_disagree_are_refused():
    drawn = Case(6, 2, 32, 16, 1, (16,), steps=4).draw()
    q, offsets, lengths = drawn.q, drawn.offsets, drawn.lengths
    pages, k_tables, v_tables = drawn.cache()
    two = np.concatenate([k_tables, k_tables])
    with pytest.raises(ValueError, match="disagree"):
        decode_attention(q[:, 0], pages, k_tables, two, lengths)
    with pytest.raises(ValueError, match="disagree"):
        decode_attention(q[:, 0], pages, two, two, lengths)
    with pytest.raises(ValueError, match="disagree"):
        decode_attention(q[:, 0, :, :16], pages, k_tables, v_tables, lengths)
    with pytest.raises(ValueError, match="5 query heads don't divide by 2 kv heads"):
        decode_attention(q[:, 0, :5], pages, k_tables, v_tables, lengths)
    with pytest.raises(ValueError, match="disagree"):
        prefill_attention(q, pages, k_tables, two, offsets, lengths)
    with pytest.raises(ValueError, match="disagree"):
        prefill_attention(q, pages[..., :16], k_tables, v_tables, offsets, lengths)
    with pytest.raises(ValueError, match="5 query heads don't divide by 2 kv heads"):
        prefill_attention(q[:, :, :5], pages, k_tables, v_tables, offsets, lengths)
