"""Decodes a tensor of any GGUF type straight into the compute dtype, a chunk at a time.

No float32 copy of a tensor ever exists: `CHUNK` values at once are decoded, rounded and checked,
while they are in the cache and on all cores (NumPy and ml_dtypes release the interpreter lock).
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType
from jaxtyping import Float, UInt8

from qwen_jax.weights import iquants, kquants, simple_quants
from qwen_jax.weights.tensors import OtherType, TensorType, block_size

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CHUNK = 1 << 18

FORMATS = simple_quants.FORMATS | kquants.FORMATS | iquants.FORMATS
_PLAIN = {
    GGMLQuantizationType.F64: np.dtype("<f8"),
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: BFLOAT16,
}
# What each byte means, in float32: twice as fast as a cast by ml_dtypes.
_FLOAT8 = {
    kind: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    for kind, dtype in {
        OtherType.F8_E4M3: ml_dtypes.float8_e4m3fn,
        OtherType.F8_E5M2: ml_dtypes.float8_e5m2,
        OtherType.F8_E8M0: ml_dtypes.float8_e8m0fnu,
    }.items()
}
DECODABLE = frozenset(FORMATS) | frozenset(_PLAIN)
"""GGML's types, each of which is decoded."""

FLOAT8 = frozenset({OtherType.F8_E4M3, OtherType.F8_E5M2})
"""Types of 8 bits that weights have in safetensors; F8_E8M0 is for their scales."""

# The exponent bits of each dtype as an unsigned integer: all set in infinities and NaNs alone.
_EXPONENTS: dict[np.dtype, np.unsignedinteger] = {
    np.dtype(np.float64): np.uint64(0x7FF0000000000000),
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(np.float16): np.uint16(0x7C00),
    BFLOAT16: np.uint16(0x7F80),
}


def decode_into(
    raw: UInt8[np.ndarray, "bytes"], kind: TensorType, out: Float[np.ndarray, "..."]
) -> bool:
    """Decodes `raw`, a tensor of a GGML or float8 type, into `out`.

    Args:
        raw: the tensor's bytes, whole blocks.
        out: C-contiguous float64, float32, bfloat16 or float16, as many values as `raw` holds;
            rounded to nearest even. What float16 cannot hold becomes an infinity.

    Returns:
        Whether every value in `out` is finite.
    """
    block, size = block_size(kind)
    if len(raw) * block != out.size * size or len(raw) % size:
        raise ValueError(f"{len(raw)=} bytes of {kind.name} do not make {out.shape=}")
    if not out.flags.c_contiguous:
        raise ValueError(f"out must be C-contiguous, {out.strides=}")

    def values(start: int, stop: int) -> np.ndarray:
        return decoded(raw[start // block * size : stop // block * size], kind)

    return fill(out.reshape(-1), values)


def fill(
    out: Float[np.ndarray, "rows ..."], values: Callable[[int, int], Float[np.ndarray, "n ..."]]
) -> bool:
    """Sets out[start:stop] to `values(start, stop)`, some `CHUNK` values at once and on all cores.

    They are rounded as in `decode_into`; returns whether every value in `out` is finite.
    """
    step = max(CHUNK // out[0].size, 1)

    def chunk(start: int) -> bool:
        part = out[start : start + step]
        # Damaged scales overflow or are NaN; the caller hears of it by `_finite`, once.
        with np.errstate(over="ignore", invalid="ignore"):
            part[...] = values(start, start + len(part))
        return _finite(part)

    starts = range(0, len(out), step)
    if len(starts) == 1:
        return chunk(0)
    return all(list(_pool().map(chunk, starts)))


def decoded(raw: UInt8[np.ndarray, "bytes"], kind: TensorType) -> Float[np.ndarray, " values"]:
    """The values of some whole blocks, on this thread; of plain numbers, the bytes themselves."""
    if isinstance(kind, OtherType):
        return _FLOAT8[kind][raw]
    if kind in _PLAIN:
        return raw.view(_PLAIN[kind])
    return FORMATS[kind].decode(raw.view(FORMATS[kind].layout)).reshape(-1)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")


def _finite(values: np.ndarray) -> bool:
    exponent = _EXPONENTS[values.dtype]
    return bool((values.view(exponent.dtype) & exponent).max() < exponent)
