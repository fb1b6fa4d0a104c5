"""The i-quants: superblocks of 256 values whose groups of four or eight are entries of a codebook.

The codebooks come from gguf, packed as llama.cpp publishes them; everything else is here.
"""

import numpy as np
from gguf import quants as tables
from gguf.constants import GGMLQuantizationType as Type
from jaxtyping import Float32, UInt8

from qwen_jax.weights.simple_quants import (
    BlockFormat,
    Blocks,
    Parts,
    bits,
    fields2,
    halves,
    layout,
    look_up,
    namespace,
    nibbles,
    once,
    scale,
)


def _codebook(table: type) -> Float32[np.ndarray, "entries width"]:
    """Unpacks a codebook: 2-bit fields where it has three levels, half-bytes where eight."""
    packed = np.frombuffer(bytes.fromhex(table.grid_hex.decode()), np.uint8)  # type: ignore[attr-defined]
    levels = np.array(table.grid_map, np.float32)  # type: ignore[attr-defined]
    width = 2 if len(levels) <= 4 else 4
    codes = (packed[:, None] >> np.arange(0, 8, width)) & ((1 << width) - 1)
    return levels[codes].reshape(table.grid_shape)  # type: ignore[attr-defined]


_IQ1 = _codebook(tables.IQ1_S)
_IQ2_XXS = _codebook(tables.IQ2_XXS)
_IQ2_XS = _codebook(tables.IQ2_XS)
_IQ2_S = _codebook(tables.IQ2_S)
_IQ3_XXS = _codebook(tables.IQ3_XXS)
_IQ3_S = _codebook(tables.IQ3_S)
_IQ4 = np.array(tables.IQ4_NL.kvalues, np.float32)

# Eight signs from a byte, one bit each; or from 7 bits, the eighth making the ones even in number.
_SIGNS = 1 - 2 * bits(np.arange(256, dtype=np.uint8)[:, None]).astype(np.float32)
_EVEN_SIGNS = _SIGNS[[i | (i.bit_count() & 1) << 7 for i in range(128)]]

_DELTA = np.float32(0.125)
_THIRDS = np.array([0, 3, 6, 9], np.uint16)
_SEVENTHS = np.array([0, 7, 14, 21], np.uint32)


def _low_high(packed: UInt8[np.ndarray, "n m"]) -> UInt8[np.ndarray, "n two_m"]:
    """Each byte's low, then high half-byte."""
    return nibbles(packed, 1).reshape(len(packed), -1)


def _halves(scales: np.ndarray) -> Float32[np.ndarray, "..."]:
    return np.float32(0.5) + scales.astype(np.float32)


def _signed(
    d: Float32[np.ndarray, "n groups"],
    grid: Float32[np.ndarray, "..."],
    signs: Float32[np.ndarray, "..."],
) -> Parts:
    """d x codebook entry x sign, each group's scale over its share of the 256 values."""
    n, groups = d.shape
    values = grid.reshape(n, groups, -1) * signs.reshape(n, groups, -1)
    return (d[:, :, None] * values,)


def _seven_bit_signs(words: np.ndarray) -> Float32[np.ndarray, "n groups 4 8"]:
    return look_up(_EVEN_SIGNS, (words[:, :, None] >> _SEVENTHS) & 127)


def _iq2_xxs(blocks: Blocks) -> Parts:
    groups = blocks["groups"]
    words = groups["signs"]
    d = scale(blocks["d"]) * _halves(words >> 28) * np.float32(0.25)
    return _signed(d, look_up(_IQ2_XXS, groups["grid"]), _seven_bit_signs(words))


def _iq2_xs(blocks: Blocks) -> Parts:
    codes = blocks["qs"]
    d = scale(blocks["d"]) * _halves(_low_high(blocks["scales"])) * np.float32(0.25)
    return _signed(d, look_up(_IQ2_XS, codes & 511), look_up(_EVEN_SIGNS, codes >> 9))


def _iq2_s(blocks: Blocks) -> Parts:
    high = fields2(blocks["qh"], 1).reshape(-1, 32).astype(np.uint16)
    codes = blocks["qs"] | (high << 8)
    d = scale(blocks["d"]) * _halves(_low_high(blocks["scales"])) * np.float32(0.25)
    return _signed(d, look_up(_IQ2_S, codes), look_up(_SIGNS, blocks["signs"]))


def _iq3_xxs(blocks: Blocks) -> Parts:
    words = blocks["signs"]
    d = scale(blocks["d"]) * _halves(words >> 28) * np.float32(0.5)
    return _signed(d, look_up(_IQ3_XXS, blocks["qs"]), _seven_bit_signs(words))


def _iq3_s(blocks: Blocks) -> Parts:
    codes = blocks["qs"] | (bits(blocks["qh"]).astype(np.uint16) << 8)
    d = scale(blocks["d"]) * (1 + 2 * _low_high(blocks["scales"]))
    return _signed(d, look_up(_IQ3_S, codes), look_up(_SIGNS, blocks["signs"]))


def _iq1_s(blocks: Blocks) -> Parts:
    high = blocks["qh"]
    d = scale(blocks["d"]) * (2 * ((high >> 12) & 7) + 1)
    delta = namespace(high).where(high & 0x8000, -_DELTA, _DELTA)[:, :, None]
    codes = blocks["qs"] | (((high[:, :, None] >> _THIRDS) & 7) << 8).reshape(-1, 32)
    return (d[:, :, None] * (look_up(_IQ1, codes).reshape(-1, 8, 32) + delta),)


def _iq1_m(blocks: Blocks) -> Parts:
    """The float16 scale lies in pieces: the top half-byte of each of four 16-bit words."""
    words = blocks["scales"]
    pieces = (words >> 12) << np.array([0, 4, 8, 12], np.uint16)
    d16 = pieces.sum(axis=1, dtype=np.uint16).view(np.float16)
    scales = ((words[:, :, None] >> _THIRDS) & 7).reshape(-1, 16)
    d = scale(d16) * (2 * scales + 1)
    high = _low_high(blocks["qh"])
    delta = namespace(high).where(high & 8, -_DELTA, _DELTA)
    codes = blocks["qs"] | ((high & 7).astype(np.uint16) << 8)
    values = look_up(_IQ1, codes) + delta[:, :, None]
    return (d[:, :, None] * values.reshape(-1, 16, 16),)


def _iq4_nl(blocks: Blocks) -> Parts:
    d = scale(blocks["d"], 2)
    return tuple(d * look_up(_IQ4, codes) for codes in halves(blocks["qs"], 16))


def _iq4_xs_apart(blocks: Blocks) -> Blocks:
    shifts = np.arange(0, 16, 2, dtype=np.uint16)
    high = ((blocks["scales_h"][:, None] >> shifts) & 3).astype(np.uint8)
    scales = (_low_high(blocks["scales_l"]) | (high << 4)).view(np.int8) - np.int8(32)
    return {"d": blocks["d"], "qs": blocks["qs"], "scales": scales}


def _iq4_xs(blocks: Blocks) -> Parts:
    d = once(scale(blocks["d"]) * blocks["scales"])[:, :, None]
    return tuple(d * look_up(_IQ4, once(codes)) for codes in halves(blocks["qs"], 16))


_IQ2_XXS_GROUP = layout(("grid", "u1", 4), ("signs", "<u4"))

FORMATS = {
    Type.IQ1_S: BlockFormat(layout(("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)), _iq1_s),
    Type.IQ1_M: BlockFormat(
        layout(("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)), _iq1_m
    ),
    Type.IQ2_XXS: BlockFormat(layout(("d", "<f2"), ("groups", _IQ2_XXS_GROUP, 8)), _iq2_xxs),
    Type.IQ2_XS: BlockFormat(layout(("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)), _iq2_xs),
    Type.IQ2_S: BlockFormat(
        layout(
            ("d", "<f2"),
            ("qs", "u1", 32),
            ("signs", "u1", 32),
            ("qh", "u1", 8),
            ("scales", "u1", 8),
        ),
        _iq2_s,
    ),
    Type.IQ3_XXS: BlockFormat(
        layout(("d", "<f2"), ("qs", "u1", 64), ("signs", "<u4", 8)), _iq3_xxs
    ),
    Type.IQ3_S: BlockFormat(
        layout(
            ("d", "<f2"),
            ("qs", "u1", 64),
            ("qh", "u1", 8),
            ("signs", "u1", 32),
            ("scales", "u1", 4),
        ),
        _iq3_s,
    ),
    Type.IQ4_NL: BlockFormat(layout(("d", "<f2"), ("qs", "u1", 16)), _iq4_nl),
    Type.IQ4_XS: BlockFormat(
        layout(("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)),
        _iq4_xs,
        _iq4_xs_apart,
    ),
}
