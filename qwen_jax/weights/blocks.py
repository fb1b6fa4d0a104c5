"""Decodes a tensor of any GGUF type straight into the compute dtype, a chunk at a time.

No float32 copy of a tensor ever exists: `CHUNK` values at once are decoded, rounded and checked,
while they are in the cache and on all cores (NumPy and ml_dtypes release the interpreter lock).
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import Float, UInt8

from qwen_jax.weights import iquants, kquants, simple_quants

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CHUNK = 1 << 18

_FORMATS = simple_quants.FORMATS | kquants.FORMATS | iquants.FORMATS
_PLAIN = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: BFLOAT16,
}
DECODABLE = frozenset(_FORMATS) | frozenset(_PLAIN)

# The exponent bits of each dtype as an unsigned integer: all set in infinities and NaNs alone.
_EXPONENTS: dict[np.dtype, np.unsignedinteger] = {
    np.dtype(np.float64): np.uint64(0x7FF0000000000000),
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(np.float16): np.uint16(0x7C00),
    BFLOAT16: np.uint16(0x7F80),
}


def decode_into(
    raw: UInt8[np.ndarray, "bytes"], kind: GGMLQuantizationType, out: Float[np.ndarray, "..."]
) -> bool:
    """Decodes `raw`, a tensor of a type in `DECODABLE`, into `out`.

    Args:
        raw: the tensor's bytes, whole blocks.
        out: C-contiguous float64, float32, bfloat16 or float16, as many values as `raw` holds;
            rounded to nearest even. What float16 cannot hold becomes an infinity.

    Returns:
        Whether every value in `out` is finite.
    """
    block, size = GGML_QUANT_SIZES[kind]
    if len(raw) * block != out.size * size or len(raw) % size:
        raise ValueError(f"{len(raw)=} bytes of {kind.name} do not make {out.shape=}")
    if not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous, {out.strides=}")
    flat = out.reshape(-1)

    def chunk(start: int) -> bool:
        stop = min(start + CHUNK, flat.size)
        part = flat[start:stop]
        _decode_chunk(raw[start // block * size : stop // block * size], kind, part)
        return _finite(part)

    starts = range(0, flat.size, CHUNK)
    if len(starts) == 1:
        return chunk(0)
    return all(list(_pool().map(chunk, starts)))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")


def _decode_chunk(raw: np.ndarray, kind: GGMLQuantizationType, out: np.ndarray) -> None:
    # Damaged scales overflow or are NaN; the caller hears of it by `_finite`, once.
    with np.errstate(over="ignore", invalid="ignore"):
        if kind in _FORMATS:
            values = _FORMATS[kind].decode(raw.view(_FORMATS[kind].layout)).reshape(-1)
        else:
            values = raw.view(_PLAIN[kind])
        out[:] = values


def _finite(values: np.ndarray) -> bool:
    exponent = _EXPONENTS[values.dtype]
    return bool((values.view(exponent.dtype) & exponent).max() < exponent)
