"""The k-quants: superblocks of 256 values, with small integer scales under one or two float16."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from jaxtyping import Int8, UInt8, UInt32

from qwen_jax.weights.simple_quants import (
    BlockFormat,
    Blocks,
    Parts,
    Values,
    fields2,
    halves,
    layout,
    namespace,
    nibbles,
    once,
    quarters,
    scale,
)


def _by_part(numbers: np.ndarray, parts: int) -> Iterator[np.ndarray]:
    """Each part's numbers [n, groups, ..., 1] of some for every 16 or 32 values in order."""
    dealt = numbers.reshape(len(numbers), 8 // parts, parts, -1, 1)
    return (once(dealt[:, :, part]) for part in range(parts))


def _scaled(d: np.ndarray, quants: np.ndarray, m: np.ndarray | None = None) -> Values:
    """d q - m, each scale over its share of a run."""
    values = d * once(quants).reshape(*d.shape[:-1], -1)
    return values if m is None else values - m


def _q2_k(blocks: Blocks) -> Parts:
    scales = blocks["scales"]
    d = once(scale(blocks["d"]) * (scales & 0x0F))
    m = once(scale(blocks["dmin"]) * (scales >> 4))
    return tuple(map(_scaled, _by_part(d, 4), quarters(blocks["qs"], 32), _by_part(m, 4)))


def _q3_k_apart(blocks: Blocks) -> Blocks:
    """Sixteen 6-bit scales: low halves in bytes 0-7, two high bits each in bytes 8-11."""
    packed = blocks["scales"]
    low = nibbles(packed[:, :8], 8).reshape(-1, 16)
    high = fields2(packed[:, 8:], 4).reshape(-1, 16)
    scales = (low | (high << 4)).view(np.int8) - np.int8(32)
    return {name: blocks[name] for name in ("hmask", "qs", "d")} | {"scales": scales}


def _q3_k(blocks: Blocks) -> Parts:
    d = once(scale(blocks["d"]) * blocks["scales"])

    def quants() -> Iterator[Int8[np.ndarray, "n 1 32"]]:
        # A mask bit of 1 means no offset; 0 means minus four.
        inverted = ~blocks["hmask"]
        for part in range(8):
            low = (blocks["qs"][f"run{part // 4}"] >> (2 * (part % 4))) & 3
            absent = (inverted >> part) & 1
            yield (low.view(np.int8) - (absent << 2).view(np.int8))[:, None]

    return tuple(map(_scaled, _by_part(d, 8), quants()))


def _scales_and_mins(
    words: UInt32[np.ndarray, "n 3"],
) -> tuple[UInt8[np.ndarray, "n 8"], UInt8[np.ndarray, "n 8"]]:
    """Eight 6-bit scales and minima of Q4_K and Q5_K, four bytes at a time.

    Bytes 0-3 hold scales 0-3 and, in their top bits, the high bits of scales 4-7; bytes 4-7 hold
    the minima likewise; bytes 8-11 the low halves of scales and minima 4-7.
    """
    scales, mins, lows = words[:, 0], words[:, 1], words[:, 2]

    def eight(first: np.ndarray, low: np.ndarray) -> UInt8[np.ndarray, "n 8"]:
        last = (low & 0x0F0F0F0F) | ((first >> 2) & 0x30303030)
        return namespace(words).stack([first & 0x3F3F3F3F, last], axis=1).view(np.uint8)

    return eight(scales, lows), eight(mins, lows >> 4)


def _scales_apart(*others: str) -> Callable[[Blocks], Blocks]:
    """What takes the scales of Q4_K or Q5_K apart, which has these other fields."""

    def apart(blocks: Blocks) -> Blocks:
        scales, mins = _scales_and_mins(blocks["scales"])
        return {name: blocks[name] for name in others} | {"scales": scales, "mins": mins}

    return apart


def _scale_and_shift(
    blocks: Blocks, parts: int, quants: Iterable[UInt8[np.ndarray, "n groups 32"]]
) -> Parts:
    d, m = once(scale(blocks["d"]) * blocks["scales"]), once(scale(blocks["dmin"]) * blocks["mins"])
    return tuple(map(_scaled, _by_part(d, parts), quants, _by_part(m, parts)))


def _q4_k(blocks: Blocks) -> Parts:
    return _scale_and_shift(blocks, 2, halves(blocks["qs"], 32))


def _q5_k(blocks: Blocks) -> Parts:
    def quants() -> Iterator[UInt8[np.ndarray, "n 1 32"]]:
        for part in range(8):
            low = (blocks["qs"][f"run{part // 2}"] >> (4 * (part % 2))) & 0x0F
            yield (low | (((blocks["qh"] >> part) & 1) << 4))[:, None]

    return _scale_and_shift(blocks, 8, quants())


def _q6_k(blocks: Blocks) -> Parts:
    def quants() -> Iterator[Int8[np.ndarray, "n 2 32"]]:
        runs = blocks["ql"]["run0"], blocks["ql"]["run1"]
        for part, high in enumerate(quarters(blocks["qh"], 32)):
            low = (runs[part % 2] >> (4 * (part // 2))) & 0x0F
            yield (low | (high << 4)).view(np.int8) - np.int8(32)

    d = once(scale(blocks["d"]) * blocks["scales"])
    return tuple(map(_scaled, _by_part(d, 4), quants()))


def _runs(count: int) -> np.dtype:
    """Some runs of 32 bytes, each a field of its own.

    Where fields lie apart, a part that takes every second run of a field would keep XLA from making
    vector code for a CPU: ten times slower.
    """
    return layout(*((f"run{i}", "u1", 32) for i in range(count)))


FORMATS = {
    Type.Q2_K: BlockFormat(
        layout(("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")), _q2_k
    ),
    Type.Q3_K: BlockFormat(
        layout(("hmask", "u1", 32), ("qs", _runs(2)), ("scales", "u1", 12), ("d", "<f2")),
        _q3_k,
        _q3_k_apart,
    ),
    Type.Q4_K: BlockFormat(
        layout(("d", "<f2"), ("dmin", "<f2"), ("scales", "<u4", 3), ("qs", "u1", 128)),
        _q4_k,
        _scales_apart("d", "dmin", "qs"),
    ),
    Type.Q5_K: BlockFormat(
        layout(
            ("d", "<f2"), ("dmin", "<f2"), ("scales", "<u4", 3), ("qh", "u1", 32), ("qs", _runs(4))
        ),
        _q5_k,
        _scales_apart("d", "dmin", "qh", "qs"),
    ),
    Type.Q6_K: BlockFormat(
        layout(("ql", _runs(2), 2), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")), _q6_k
    ),
}
