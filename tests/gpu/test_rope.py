"""The rope kernel against NumPy float64, beside the XLA reference's own error."""

import secrets

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests.engines import relative
from tests.kernels.sizes import HEADS
from tests.numpy_reference import rotate

SEED = secrets.randbits(32)
LAST = 131071

# size, rows B, positions T, pairs R/2 that turn, dtype
CASES = [
    ("0.5b", 1, 1, 32, "bfloat16"),
    ("7b", 2, 72, 64, "bfloat16"),
    ("1.5b", 8, 3, 64, "float16"),
    ("3b", 1, 512, 64, "bfloat16"),
    ("0.5b", 5, 1, 16, "float16"),
    ("72b", 3, 1, 32, "bfloat16"),
]


@pytest.mark.parametrize(("size", "rows", "steps", "pairs", "dtype"), CASES)
@pytest.mark.parametrize("attention_factor", [1.0, 1.25])
def test_rotation(size, rows, steps, pairs, dtype, attention_factor):
    """Positions to the last one there can be; dimensions that don't turn pass bit for bit."""
    rng = np.random.default_rng(SEED)
    heads, kv_heads, dim = HEADS[size]
    q, k = (
        np.asarray(jnp.asarray(rng.standard_normal((rows, steps, n, dim)), dtype))
        for n in (heads, kv_heads)
    )
    positions = rng.integers(0, LAST + 1, (rows, steps)).astype(np.int32)
    positions[0, -1] = LAST
    inv_freq = (1e6 ** (-np.arange(pairs) / pairs)).astype(np.float32)

    def run(implementation: str) -> list[np.ndarray]:
        outputs = pallas_kernels.rope(
            *(jnp.asarray(x) for x in (q, k, positions, inv_freq)),
            attention_factor=attention_factor,
            implementation=implementation,
        )
        return [np.asarray(x) for x in outputs]

    # The angles as defined: one float32 product, taken to float64 for the rest.
    angles = (positions.astype(np.float32)[:, :, None, None] * inv_freq).astype(np.float64)
    ours, again, xla = run("mosaic_gpu"), run("mosaic_gpu"), run("xla")
    for name, x, out, same, reference in zip("qk", (q, k), ours, again, xla, strict=True):
        expected = rotate(x.astype(np.float64), angles)[..., : 2 * pairs] * attention_factor
        error, reference_error = (relative(y[..., : 2 * pairs], expected) for y in (out, reference))
        print(
            f"{size} {name} {rows} x {steps} {dtype} {pairs} of {dim}: error {error:.2e}, "
            f"the XLA reference's {reference_error:.2e} ({SEED=})"
        )
        assert error <= 2 * reference_error
        np.testing.assert_array_equal(out[..., 2 * pairs :], x[..., 2 * pairs :])
        np.testing.assert_array_equal(out, same)


def test_auto_leaves_rope_to_xla():
    assert pallas_kernels.choose("rope", "auto") == "xla"
    assert "XLA fuses it" in str(pallas_kernels.refusal("rope"))
