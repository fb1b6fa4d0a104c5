"""`rope` against NumPy float64, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests.engines import relative
from tests.numpy_reference import rotate

# One compilation a case, as in the model, instead of one an operation.
rope = jax.jit(pallas_kernels.rope, static_argnames=("attention_factor", "implementation"))
EPS = float(np.finfo(np.float32).eps)
LAST = 131071

# rows B, positions T, query heads N, key heads K, head dimension H, rotary dimension R
SHAPES = [
    (1, 1, 1, 1, 2, 2),
    (2, 7, 6, 2, 32, 32),
    (3, 1, 14, 2, 64, 64),
    (1, 33, 5, 5, 10, 6),
    (2, 5, 4, 1, 128, 32),
    (1, 17, 3, 1, 96, 94),
]


def frequencies(rotary: int, theta: float = 1e6) -> np.ndarray:
    return (theta ** (-np.arange(0, rotary, 2) / rotary)).astype(np.float32)


def drawn(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> tuple[np.ndarray, ...]:
    """q, k and positions; the last position of every row is the last one there can be."""
    batch, steps, heads, kv_heads, dim, _ = shape
    rng = np.random.default_rng(seed)
    q = np.array(jnp.asarray(rng.normal(size=(batch, steps, heads, dim)), dtype))
    k = np.array(jnp.asarray(rng.normal(size=(batch, steps, kv_heads, dim)), dtype))
    positions = rng.integers(0, LAST + 1, (batch, steps)).astype(np.int32)
    positions[:, -1] = LAST
    return q, k, positions


def angles32(positions: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    """The angles as defined: one float32 product, taken to float64 for the rest."""
    return (positions.astype(np.float32)[:, :, None, None] * inv_freq).astype(np.float64)


@pytest.mark.parametrize("implementation", ["xla"])
class TestRope:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_the_rotation_of_its_float32_angles(self, implementation, shape):
        q, k, positions = drawn(shape, seed=1)
        inv_freq = frequencies(shape[-1])
        got = rope(q, k, positions, inv_freq, implementation=implementation)
        for ours, x in zip(got, (q, k), strict=True):
            # Roundings of cos or sin, a product and a sum: eps / 2 / sqrt(3) each, 0.5 eps in
            # quadrature; as much again is left to the error of cos and sin themselves.
            assert relative(ours, rotate(x, angles32(positions, inv_freq))) <= EPS

    @pytest.mark.parametrize("last", [100, 4096, 32767, LAST])
    def test_is_near_the_exact_rotation(self, implementation, last):
        """An angle of a radians is off by a * eps / 2 at most, and so is what it turns."""
        q, k, positions = drawn((2, 64, 4, 2, 64, 64), seed=2)
        positions = positions % (last + 1)
        inv_freq = frequencies(64)
        exact = positions[:, :, None, None] * inv_freq.astype(np.float64)
        got, _ = rope(q, k, positions, inv_freq, implementation=implementation)
        assert relative(got, rotate(q, exact)) <= EPS + np.sqrt((exact**2).mean()) * EPS / 2

    def test_position_zero_is_the_identity(self, implementation):
        q, k, _ = drawn((2, 3, 4, 2, 8, 8), seed=3)
        positions = np.zeros((2, 3), np.int32)
        got = rope(q, k, positions, frequencies(8), implementation=implementation)
        np.testing.assert_array_equal(got[0], q)
        np.testing.assert_array_equal(got[1], k)

    def test_pairs_are_half_a_rotary_dimension_apart(self, implementation):
        """By hand: at position 1 and frequency pi/2, (1, 0) becomes (0, 1); 2 turns half as far."""
        x = np.zeros((1, 1, 1, 6), np.float32)
        x[..., :] = [1, 1, 0, 0, 7, 8]  # pairs (0, 2) and (1, 3); 4 and 5 do not turn
        inv_freq = np.array([np.pi / 2, np.pi / 4], np.float32)
        one = np.ones((1, 1), np.int32)
        got, _ = rope(x, x, one, inv_freq, implementation=implementation)
        half = np.sqrt(0.5)
        np.testing.assert_allclose(got[0, 0, 0], [0, half, 1, half, 7, 8], atol=2 * EPS)

    def test_adjacent_large_positions_differ(self, implementation):
        """bfloat16 would round 131071 to 131072, and 257 to 256."""
        x = np.ones((1, 4, 1, 4), np.float32)
        positions = np.array([[256, 257, LAST - 1, LAST]], np.int32)
        got = rope(x, x, positions, frequencies(4), implementation=implementation)
        q = np.asarray(got[0])
        assert relative(q[0, 0], q[0, 1]) > 0.1 and relative(q[0, 2], q[0, 3]) > 0.1

    def test_the_rest_passes_bit_for_bit(self, implementation):
        q, k, positions = drawn((2, 5, 4, 1, 128, 32), seed=4)
        q[0, 0, 0, 127] = np.nan
        got = rope(q, k, positions, frequencies(32), implementation=implementation)
        np.testing.assert_array_equal(got[0][..., 32:], q[..., 32:])
        np.testing.assert_array_equal(got[1][..., 32:], k[..., 32:])
        assert not np.isnan(np.asarray(got[0])[..., :32]).any()

    def test_attention_factor_scales_what_turns(self, implementation):
        q, k, positions = drawn((2, 7, 6, 2, 32, 16), seed=5)
        inv_freq, factor = frequencies(16), 1.25
        got, _ = rope(
            q, k, positions, inv_freq, attention_factor=factor, implementation=implementation
        )
        expected = rotate(q, angles32(positions, inv_freq))
        expected[..., :16] *= factor
        assert relative(got, expected) <= 1.5 * EPS  # two roundings more

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_is_rounded_once(self, implementation, dtype):
        q, k, positions = drawn((2, 7, 6, 2, 32, 32), seed=6, dtype=dtype)
        inv_freq = frequencies(32)
        got = rope(q, k, positions, inv_freq, implementation=implementation)
        for ours, x in zip(got, (q, k), strict=True):
            assert ours.dtype == dtype
            expected = rotate(x.astype(np.float64), angles32(positions, inv_freq))
            unit = float(jnp.finfo(dtype).eps) / 2
            assert relative(ours, expected) <= unit

    def test_repeats_bit_for_bit(self, implementation):
        q, k, positions = drawn((2, 7, 6, 2, 32, 32), seed=7)
        first, second = (
            rope(q, k, positions, frequencies(32), implementation=implementation) for _ in range(2)
        )
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])


def test_shapes_that_disagree_are_refused():
    q, k, positions = drawn((2, 5, 4, 2, 8, 8), seed=8)
    with pytest.raises(ValueError, match=r"\(2, 4\).*disagree"):
        rope(q, k, positions[:, :4], frequencies(8))
    with pytest.raises(ValueError, match=r"\(2, 4, 2, 8\).*disagree"):
        rope(q, k[:, :4], positions, frequencies(8))
    with pytest.raises(ValueError, match="5 frequencies need more than 8"):
        rope(q, k, positions, frequencies(10))
