"""Float32 to llama.cpp's K-quants and IQ4_NL, each value to the nearest of its block's grid.

Layouts are those of ggml-common.h; `gguf.quants` reads them back. A block's scale is the plain
one, from its largest value or its range: llama.cpp searches for better ones.
"""

from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from jaxtyping import Float, UInt8

BLOCK = 256
IQ4_GRID = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
"""ggml-common.h: kvalues_iq4nl."""


def encode(values: Float[np.ndarray, "R C"], kind: Type) -> UInt8[np.ndarray, "R bytes"]:
    """A matrix as the bytes of its blocks; columns are whole blocks."""
    size = gguf.GGML_QUANT_SIZES[kind][0]
    return ENCODERS[kind](values.reshape(-1, size)).reshape(len(values), -1)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape, np.float32), where=b != 0)


def _half(x: np.ndarray) -> np.ndarray:
    """As float16 holds it, in float32: the grid is built on what will be read."""
    return x.astype(np.float16).astype(np.float32)


def _bytes(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(
        [np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1) for part in parts], axis=1
    )


def _with_minimum(
    x: np.ndarray, groups: int, top: int, scale_top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x = d * scale * q - dmin * minimum, q from 0 to `top`, in groups of a block.

    Returns q, d, dmin and the groups' scales and minima, from 0 to `scale_top`.
    """
    x = x.reshape(len(x), groups, -1)
    low = np.minimum(x.min(-1), 0)
    step, drop = (np.maximum(x.max(-1), 0) - low) / top, -low
    d, dmin = (_half(part.max(-1, keepdims=True) / scale_top) for part in (step, drop))
    scale, minimum = (
        np.clip(np.rint(_divide(part, unit)), 0, scale_top)
        for part, unit in ((step, d), (drop, dmin))
    )
    q = _divide(x + (dmin * minimum)[..., None], (d * scale)[..., None])
    return np.clip(np.rint(q), 0, top).astype(np.uint8), d, dmin, scale, minimum


def _symmetric(x: np.ndarray, groups: int, bottom: int, scale_bottom: int) -> tuple:
    """x = d * scale * q, q from `bottom` to -bottom - 1; scales from `scale_bottom` on, too.

    Returns q, d and the groups' scales.
    """
    x = x.reshape(len(x), groups, -1)
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]
    step = largest / bottom  # The value of largest magnitude, whatever its sign, is `bottom`.
    widest = np.take_along_axis(step, np.abs(step).argmax(-1)[:, None], -1)
    d = _half(widest / scale_bottom)
    scale = np.clip(np.rint(_divide(step, d)), scale_bottom, -scale_bottom - 1)
    q = np.clip(np.rint(_divide(x, (d * scale)[..., None])), bottom, -bottom - 1)
    return q.astype(np.int8), d, scale.astype(np.int8)


def _pack_six(scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of 6 bits in 12 bytes, as Q4_K and Q5_K hold them."""
    s, m = scale.astype(np.uint8), minimum.astype(np.uint8)
    high = ((s[:, 4:] >> 4) << 6, (m[:, 4:] >> 4) << 6)
    return np.concatenate(
        [s[:, :4] | high[0], m[:, :4] | high[1], (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4], axis=1
    )


def _q2_k(x: np.ndarray) -> np.ndarray:
    q, d, dmin, scale, minimum = _with_minimum(x, 16, 3, 15)
    # Two bits each: byte i of a half holds the values i, 32 + i, 64 + i and 96 + i.
    q = q.reshape(-1, 2, 4, 32)
    packed = q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6
    scales = scale.astype(np.uint8) | minimum.astype(np.uint8) << 4
    return _bytes(scales, packed, d.astype(np.float16), dmin.astype(np.float16))


def _q3_k(x: np.ndarray) -> np.ndarray:
    q, d, scale = _symmetric(x, 16, -4, -32)
    q = (q.astype(np.int16) + 4).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = q & 3
    packed = low[:, :, 0] | low[:, :, 1] << 2 | low[:, :, 2] << 4 | low[:, :, 3] << 6
    # Bit j of byte i: the third bit of value 32 j + i.
    third = q.reshape(-1, 8, 32) >> 2
    mask = np.bitwise_or.reduce(third << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    s = (scale.astype(np.int16) + 32).astype(np.uint8)
    nibbles = (s[:, :8] & 15) | (s[:, 8:] & 15) << 4
    high = (s >> 4).reshape(-1, 4, 4)
    upper = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    return _bytes(mask.astype(np.uint8), packed, nibbles, upper, d.astype(np.float16))


def _q4_k(x: np.ndarray) -> np.ndarray:
    q, d, dmin, scale, minimum = _with_minimum(x, 8, 15, 63)
    q = q.reshape(-1, 4, 2, 32)
    packed = q[:, :, 0] | q[:, :, 1] << 4
    return _bytes(d.astype(np.float16), dmin.astype(np.float16), _pack_six(scale, minimum), packed)


def _q5_k(x: np.ndarray) -> np.ndarray:
    q, d, dmin, scale, minimum = _with_minimum(x, 8, 31, 63)
    fifth = q.reshape(-1, 8, 32) >> 4
    high = np.bitwise_or.reduce(fifth << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    low = (q & 15).reshape(-1, 4, 2, 32)
    packed = low[:, :, 0] | low[:, :, 1] << 4
    six = _pack_six(scale, minimum)
    return _bytes(d.astype(np.float16), dmin.astype(np.float16), six, high.astype(np.uint8), packed)


def _q6_k(x: np.ndarray) -> np.ndarray:
    q, d, scale = _symmetric(x, 16, -32, -128)
    q = (q.astype(np.int16) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low, high = q & 15, q >> 4
    lower = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], 2)
    upper = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return _bytes(lower, upper, scale, d.astype(np.float16))


def _iq4_nl(x: np.ndarray) -> np.ndarray:
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[:, None], -1)
    d = _half(largest / IQ4_GRID[0])
    q = np.abs(_divide(x, d)[..., None] - IQ4_GRID).argmin(-1).astype(np.uint8)
    return _bytes(d.astype(np.float16), q[:, :16] | q[:, 16:] << 4)


ENCODERS: dict[Type, Callable[[np.ndarray], np.ndarray]] = {
    Type.Q2_K: _q2_k,
    Type.Q3_K: _q3_k,
    Type.Q4_K: _q4_k,
    Type.Q5_K: _q5_k,
    Type.Q6_K: _q6_k,
    Type.IQ4_NL: _iq4_nl,
}
