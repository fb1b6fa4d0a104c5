"""Every block format against gguf.quants, which shares only its codebooks with our decoders."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.weights import blocks, simple_quants

TYPES = sorted(blocks.DECODABLE - {Type.F64}, key=lambda kind: kind.name)
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def random_raw(kind: Type, num_blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes: NaN, infinite, subnormal and negative scales all occur."""
    return np.random.default_rng(seed).integers(
        0, 256, num_blocks * GGML_QUANT_SIZES[kind][1], dtype=np.uint8
    )


def oracle(raw: np.ndarray, kind: Type) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw.reshape(-1, GGML_QUANT_SIZES[kind][1]), kind).reshape(-1)


def decode(raw: np.ndarray, kind: Type, dtype: type = np.float32) -> tuple[np.ndarray, bool]:
    block, size = GGML_QUANT_SIZES[kind]
    out = np.full(len(raw) // size * block, 7, dtype)
    finite = blocks.decode_into(raw, kind, out)
    return out, finite


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, signs of zeros included; a NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # bfloat16's isnan signals
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(bits)[~nan], expected.view(bits)[~nan])


def test_every_type_that_gguf_decodes_is_decoded():
    decodable = set()
    for kind in Type:
        try:
            gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            continue
        decodable.add(kind)
    assert decodable == blocks.DECODABLE - {Type.F64}
    assert len(decodable) == 26


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_layout_has_the_size_gguf_declares(kind):
    if kind in blocks.FORMATS:
        assert blocks.FORMATS[kind].layout.itemsize == GGML_QUANT_SIZES[kind][1]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_random_blocks_equal_gguf_to_the_bit(kind):
    raw = random_raw(kind, 4096)
    actual, finite = decode(raw, kind)
    expected = oracle(raw, kind)
    assert_same(actual, expected)
    assert finite == bool(np.isfinite(expected).all())


@pytest.mark.parametrize("kind", [Type.TQ1_0, Type.MXFP4, Type.NVFP4, Type.BF16, Type.F16])
def test_every_byte_in_every_place(kind):
    size = GGML_QUANT_SIZES[kind][1]
    raw = np.repeat(np.arange(256, dtype=np.uint8), size)
    assert_same(decode(raw, kind)[0], oracle(raw, kind))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(TYPES),
    dtype=st.sampled_from(DTYPES),
    num_blocks=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_other_dtypes_round_to_nearest_even(kind, dtype, num_blocks, seed):
    raw = random_raw(kind, num_blocks, seed)
    with np.errstate(all="ignore"):
        expected = oracle(raw, kind).astype(dtype)
    actual, finite = decode(raw, kind, dtype)
    assert_same(actual, expected)
    assert finite == bool(np.isfinite(expected.astype(np.float32)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q6_K, Type.F16, Type.BF16, Type.F32])
def test_chunks_and_threads_change_nothing(kind, dtype):
    block, _ = GGML_QUANT_SIZES[kind]
    num_blocks = (3 * blocks.CHUNK + 1024) // block
    raw = random_raw(kind, num_blocks)
    with np.errstate(all="ignore"):
        expected = oracle(raw, kind).astype(dtype)
    assert_same(decode(raw, kind, dtype)[0], expected)


def test_bfloat16_rounds_every_kind_of_float32_as_gguf_does():
    edges = np.arange(0x10000, dtype=np.uint32) << 16
    lows = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (edges[:, None] | lows).reshape(-1).view(np.float32)
    expected = gguf.quants.quantize(values, Type.BF16).view(ml_dtypes.bfloat16)
    actual, _ = decode(values.view(np.uint8), Type.F32, ml_dtypes.bfloat16)
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_value_that_is_not_finite_is_noticed_in_any_chunk(dtype, bad):
    values = np.ones(2 * blocks.CHUNK + 5, np.float32)
    assert decode(values.view(np.uint8), Type.F32, dtype)[1]
    values[-1] = bad
    assert not decode(values.view(np.uint8), Type.F32, dtype)[1]


def test_float16_overflow_is_noticed():
    values = np.array([65504, 65519, -65504], np.float32)
    assert decode(values.view(np.uint8), Type.F32, np.float16)[1]
    values[0] = 65520  # the first that rounds to infinity
    assert not decode(values.view(np.uint8), Type.F32, np.float16)[1]


def test_no_float32_copy_of_a_tensor_exists(monkeypatch):
    """Two threads hold two chunks, whatever the tensor's size: here 40 chunks of 1 MiB."""
    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(blocks, "_pool", lambda: pool)
        raw = np.zeros(40 * blocks.CHUNK // 256 * 144, np.uint8)
        out = np.empty(40 * blocks.CHUNK, ml_dtypes.bfloat16)
        tracemalloc.start()
        blocks.decode_into(raw, Type.Q4_K, out)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2 * 4 * 4 * blocks.CHUNK


def test_wrong_sizes_are_refused():
    out = np.empty(64, np.float32)
    with pytest.raises(ValueError, match="do not make"):
        blocks.decode_into(np.zeros(33, np.uint8), Type.Q8_0, out)
    with pytest.raises(ValueError, match="do not make"):
        blocks.decode_into(np.zeros(34, np.uint8), Type.Q8_0, out)
    with pytest.raises(ValueError, match="contiguous"):
        blocks.decode_into(np.zeros(34, np.uint8), Type.Q8_0, out[::2])


def test_a_hand_worked_q4_0_block():
    """d = 0.5; byte i holds i below and 15 - i above: values (i - 8) / 2, then (7 - i) / 2."""
    quants = np.arange(16, dtype=np.uint8)
    raw = np.concatenate([np.float16([0.5]).view(np.uint8), quants | ((15 - quants) << 4)])
    expected = np.concatenate([(np.arange(16) - 8) / 2, (7 - np.arange(16)) / 2])
    np.testing.assert_array_equal(decode(raw, Type.Q4_0)[0], expected)


def test_nibbles_are_low_halves_then_high_halves():
    packed = np.array([[0x21, 0x43, 0x65, 0x87]], np.uint8)
    np.testing.assert_array_equal(
        simple_quants.nibbles(packed, 2), [[[[1, 3], [2, 4]], [[5, 7], [6, 8]]]]
    )
