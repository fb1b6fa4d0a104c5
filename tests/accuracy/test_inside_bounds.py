"""Bounds of the decode-step kernels beside their arithmetic, imitated in NumPy."""

import gguf
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.decode_step import Packed, StepPlan, empty_stream, tile_offsets
from pallas_kernels.decode_step.packed.plan import O_PROJ
from qwen_jax.accuracy.inside.bounds import KEPT, Valued, product
from qwen_jax.accuracy.inside.held import Matrix, matrix
from qwen_jax.weights.blocks import FORMATS
from tests.kernels.emulated_step import SMALL
from tests.kernels.streams import as_stored, kind_of, put

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def cut_off(x: np.ndarray) -> np.ndarray:
    """Float64 numbers with 24 bits, what is behind them left out."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.trunc(fraction * 2.0**24), exponent - 24)


def multiplied(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """As tensor cores do it: 16 products at a time onto a sum, which keeps 24 bits."""
    total = np.zeros((len(x), len(w)))
    for first in range(0, x.shape[1], 16):
        total = cut_off(total + x[:, first : first + 16] @ w[:, first : first + 16].T)
    return total


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(np.float32).astype(DTYPES[dtype]).astype(np.float64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["any sign", "one sign"])
@pytest.mark.parametrize("dtype", KEPT)
def test_inputs_of_few_rows_are_two_numbers(dtype: str, mean: float, seed: int) -> None:
    """One of them alone is past the bound, and so is a product left out."""
    rng = np.random.default_rng(seed)
    x = (mean + rng.standard_normal((4, 896))).astype(np.float32).astype(np.float64)
    w = rounded(mean + rng.standard_normal((64, 896)), dtype)
    first = rounded(x, dtype)
    scale = 2.0**11
    rest = rounded((x - first) * scale, dtype) / scale
    held = Matrix(w.astype(np.float32), None, None)
    right = product(Valued.exactly(x), held, KEPT[dtype])
    assert np.array_equal(right.value, x @ w.T)

    def worst(found: np.ndarray) -> float:
        return float((np.abs(found - right.value) / right.limit).max())

    both = multiplied(first, w) + multiplied(rest, w)
    assert 0.001 < worst(both) < 1
    assert worst(multiplied(first, w)) > 1
    assert worst(both - x[:, :1] * w[:, 0]) > 1


STORED = ("q8_0", "iq4_nl", "q4_0", "q6_k", "q3_k", "q4_k", "q2_k", "q5_1")


@pytest.mark.parametrize("stored", STORED)
def test_what_a_format_is_made_of(stored: str) -> None:
    """Codes and addends apart are gguf's; a weight in float16 is as near as is said."""
    plan, rng = StepPlan.uniform(SMALL, 7, stored), np.random.default_rng(0)
    raw = as_stored(0.08 * rng.standard_normal((256, 256), np.float32), stored)
    stream = put(plan, empty_stream(plan), raw, O_PROJ)
    packed = Packed(stream, stream, stream, tile_offsets(plan))
    few, many = (matrix(packed, plan, O_PROJ, 0, which) for which in (True, False))
    kind = kind_of(stored)
    values = gguf.quants.dequantize(raw, kind)
    assert np.array_equal(few.values, values) and np.array_equal(many.values, values)
    assert (few.addends is not None) == (stored not in ("q8_0", "iq4_nl"))
    if few.addends is not None:
        # What is left of a weight whose code is zero.
        units = raw.copy().view(FORMATS[kind].layout)
        for name in {"qs", "ql", "qh", "hmask"} & {*(units.dtype.names or ())}:
            units[name] = 0
        zeros = gguf.quants.dequantize(units.view(np.uint8).reshape(raw.shape), kind)
        np.testing.assert_array_equal(few.addends, zeros)
    assert few.rounding is None and many.addends is None and many.rounding is not None
    off, said = np.abs(rounded(values, "float16") - values), np.sqrt(many.rounding)
    assert (off <= said).all()
    assert (said <= 2.0**-6 * np.abs(values).max()).all()
