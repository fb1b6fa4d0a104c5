"""The k-quants: superblocks of 256 values, with small integer scales under one or two float16."""

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from jaxtyping import UInt8

from qwen_jax.weights.simple_quants import (
    BlockFormat,
    Blocks,
    Values,
    fields2,
    layout,
    namespace,
    nibbles,
    scale,
)

_BIT = np.arange(8, dtype=np.uint8)[:, None]


def _q2_k(blocks: Blocks) -> Values:
    scales = blocks["scales"]
    d = scale(blocks["d"]) * (scales & 0x0F)
    m = scale(blocks["dmin"]) * (scales >> 4)
    quants = fields2(blocks["qs"], 32).reshape(-1, 16, 16)
    return d[:, :, None] * quants - m[:, :, None]


def _q3_k(blocks: Blocks) -> Values:
    """Sixteen 6-bit scales: low halves in bytes 0-7, two high bits each in bytes 8-11."""
    packed = blocks["scales"]
    low = nibbles(packed[:, :8], 8).reshape(-1, 16)
    high = fields2(packed[:, 8:], 4).reshape(-1, 16)
    d = scale(blocks["d"]) * ((low | (high << 4)).view(np.int8) - np.int8(32))
    quants = fields2(blocks["qs"], 32).view(np.int8).reshape(-1, 8, 32)
    # A mask bit of 1 means no offset; 0 means minus four.
    absent = (~blocks["hmask"][:, None] >> _BIT) & 1
    quants -= (absent << 2).view(np.int8)
    return d[:, :, None] * quants.reshape(-1, 16, 16)


def _scales_and_mins(
    packed: UInt8[np.ndarray, "n 12"],
) -> tuple[UInt8[np.ndarray, "n 8"], UInt8[np.ndarray, "n 8"]]:
    """Eight 6-bit scales and minima of Q4_K and Q5_K.

    Bytes 0-3 hold scales 0-3 and, in their top bits, the high bits of scales 4-7; bytes 4-7 hold
    the minima likewise; bytes 8-11 the low halves of scales and minima 4-7.
    """
    scales, mins, lows = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    concatenate = namespace(packed).concatenate
    return (
        concatenate([scales & 0x3F, (lows & 0x0F) | ((scales >> 2) & 0x30)], axis=1),
        concatenate([mins & 0x3F, (lows >> 4) | ((mins >> 2) & 0x30)], axis=1),
    )


def _scale_and_shift(blocks: Blocks, quants: UInt8[np.ndarray, "n 8 32"]) -> Values:
    scales, mins = _scales_and_mins(blocks["scales"])
    d, m = scale(blocks["d"]) * scales, scale(blocks["dmin"]) * mins
    return d[:, :, None] * quants - m[:, :, None]


def _q4_k(blocks: Blocks) -> Values:
    return _scale_and_shift(blocks, nibbles(blocks["qs"], 32).reshape(-1, 8, 32))


def _q5_k(blocks: Blocks) -> Values:
    low = nibbles(blocks["qs"], 32).reshape(-1, 8, 32)
    high = (blocks["qh"][:, None] >> _BIT) & 1
    return _scale_and_shift(blocks, low | (high << 4))


def _q6_k(blocks: Blocks) -> Values:
    low = nibbles(blocks["ql"], 64).reshape(-1, 256)
    high = fields2(blocks["qh"], 32).reshape(-1, 256)
    quants = (low | (high << 4)).view(np.int8) - np.int8(32)
    d = scale(blocks["d"]) * blocks["scales"]
    return d[:, :, None] * quants.reshape(-1, 16, 16)


FORMATS = {
    Type.Q2_K: BlockFormat(
        layout(("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")), _q2_k
    ),
    Type.Q3_K: BlockFormat(
        layout(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")), _q3_k
    ),
    Type.Q4_K: BlockFormat(
        layout(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)), _q4_k
    ),
    Type.Q5_K: BlockFormat(
        layout(
            ("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)
        ),
        _q5_k,
    ),
    Type.Q6_K: BlockFormat(
        layout(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")), _q6_k
    ),
}
