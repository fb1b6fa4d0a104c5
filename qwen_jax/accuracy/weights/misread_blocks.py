"""How loaders misread quantised blocks: the tensor's bytes, changed, and decoded by gguf.quants.

What the wrong decoder reads is put where the right one looks, so that its result is the wrong
decoder's, to the bit.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from qwen_jax.accuracy.weights.faults import Tensor, Variant, WeightFault
from qwen_jax.weights.blocks import FORMATS

Blocks = UInt8[np.ndarray, "blocks bytes"]

_MOST_BYTES = 64
"""How far off a start is searched: twice GGUF's usual alignment."""


def _blocks(tensor: Tensor, shift: int = 0) -> tuple[Blocks, np.dtype] | None:
    """The bytes of the tensor's rows, a block a row, and a block's fields; None if it has none."""
    source = tensor.source
    if not source.quantised:
        return None
    info = source.info(tensor.name)
    if info.type not in FORMATS or len(info.shape) == 1:
        return None
    row = info.nbytes // info.shape[0]
    stop = info.shape[0] if tensor.stop is None else tensor.stop
    raw = source.bytes(tensor.name, tensor.start * row + shift, stop * row + shift)
    layout = FORMATS[info.type].layout
    return raw.reshape(-1, layout.itemsize), layout


def _decode(tensor: Tensor, blocks: Blocks) -> np.ndarray:
    return tensor.source.decode(tensor.name, np.ascontiguousarray(blocks).reshape(-1))


def _byte_offset(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    source = tensor.source
    if not source.quantised:
        return
    info = source.info(tensor.name)
    stop = info.shape[0] if tensor.stop is None else tensor.stop
    row = info.nbytes // info.shape[0]
    found = _blocks(tensor)
    size = found[1].itemsize if found else row
    shifts = {s * d for d in (*range(1, _MOST_BYTES + 1), size, row) for s in (1, -1)}
    for shift in sorted(shifts, key=lambda s: (abs(s), s)):
        raw = source.bytes(tensor.name, tensor.start * row + shift, stop * row + shift)
        yield f"by {shift:+d} bytes", source.decode(tensor.name, raw)


def _block_offset(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    found = _blocks(tensor)
    if found is None:
        return
    blocks, layout = found
    size = layout.itemsize
    for shift in (2, -2, 4, -4, 1, -1, 8, -8):
        yield f"block read from byte {shift % size}", _decode(tensor, np.roll(blocks, -shift, 1))
    for name in ("d", "dmin", "m"):
        if name not in (layout.fields or {}) or layout[name] != np.dtype("<f2"):
            continue
        at, _width = _place(layout, name)
        for other in sorted({0, 2, 4, size - 4, size - 2} - {at}):
            wrong = blocks.copy()
            wrong[:, at : at + 2] = blocks[:, other : other + 2]
            yield f"{name} read at byte {other}, not {at}", _decode(tensor, wrong)


def _block_stride(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    found = _blocks(tensor)
    if found is None:
        return
    (count, size), info = found[0].shape, tensor.source.info(tensor.name)
    start = tensor.start * (info.nbytes // info.shape[0])
    for stride in (size + 2, size - 2, size + 4, size - 4, size + 1, size - 1):
        first = start // size * stride
        raw = tensor.source.bytes(tensor.name, first, first + count * stride + size)
        windows = np.lib.stride_tricks.sliding_window_view(raw, size)[::stride][:count]
        yield f"blocks {stride} bytes apart, not {size}", _decode(tensor, windows)


def _nibbles(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    found = _blocks(tensor)
    if found is None:
        return
    blocks, layout = found
    for field in ("qs", "ql"):
        if (
            field not in (layout.fields or {})
            or tensor.source.info(tensor.name).type.name == "Q8_0"
        ):
            continue
        at, width = _place(layout, field)
        wrong = blocks.copy()
        packed = blocks[:, at : at + width]
        wrong[:, at : at + width] = (packed >> 4) | (packed << 4)
        yield "high half-byte first", _decode(tensor, wrong)
        run = 32 if "scales" in (layout.fields or {}) else 16
        values = tensor.values()
        if values.shape[-1] % (2 * run) == 0:
            halves = values.reshape(len(values), -1, 2, run)
            yield (
                "low and high half-bytes side by side",
                halves.swapaxes(2, 3).reshape(values.shape),
            )


def _high_bits(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    yield from _without(tensor, ("qh", "hmask"), "high bits")


def _offset_ignored(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    """Values less what blocks of zero quants decode to: -8 d, -32 d, the minimum, ..."""
    found = _blocks(tensor)
    if found is None:
        return
    blocks, layout = found
    wrong = blocks.copy()
    for field in ("qs", "ql", "qh", "hmask"):
        if field in (layout.fields or {}):
            at, width = _place(layout, field)
            wrong[:, at : at + width] = 0
    offset = _decode(tensor, wrong)
    if offset.any():
        yield "", tensor.values() - offset


def _scale_ignored(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    found = _blocks(tensor)
    if found is None or "d" not in (found[1].fields or {}):
        return
    blocks, layout = found
    at, width = _place(layout, "d")
    if width == 2:
        wrong = blocks.copy()
        wrong[:, at : at + 2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
        yield "", _decode(tensor, wrong)


def _k_scales(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    found = _blocks(tensor)
    if found is None:
        return
    kind = tensor.source.info(tensor.name).type.name
    if kind not in _WRONG_SCALES:
        return
    blocks, layout = found
    at, width = _place(layout, "scales")
    for detail, scales in _WRONG_SCALES[kind](blocks[:, at : at + width]):
        wrong = blocks.copy()
        wrong[:, at : at + width] = scales
        yield detail, _decode(tensor, wrong)


# Each yields the packed scales for which the right decoder unpacks what a wrong one does.
Scales = Iterator[tuple[str, UInt8[np.ndarray, "n bytes"]]]


def _one_byte_scales(packed: UInt8[np.ndarray, "n 16"]) -> Scales:
    yield "the first one used for all", np.repeat(packed[:, :1], 16, 1)
    yield "order reversed", packed[:, ::-1]
    yield "one for every 32 values, not 16", np.repeat(packed[:, :8], 2, 1)


def _q2_scales(packed: UInt8[np.ndarray, "n 16"]) -> Scales:
    yield "scales and minima exchanged", (packed >> 4) | (packed << 4)
    yield from _one_byte_scales(packed)


def _q3_scales(packed: UInt8[np.ndarray, "n 12"]) -> Scales:
    without = packed.copy()
    without[:, 8:] = 0
    yield "high bits dropped", without
    exchanged = packed.copy()
    exchanged[:, :8] = (packed[:, :8] >> 4) | (packed[:, :8] << 4)
    yield "high half-byte first", exchanged


def _six_bit_scales(packed: UInt8[np.ndarray, "n 12"]) -> Scales:
    low6 = packed & 0x3F
    yield "packed bytes read as scales and minima", _pack(low6[:, :8], low6[:, 4:])
    exchanged = packed.copy()
    exchanged[:, :4], exchanged[:, 4:8] = packed[:, 4:8], packed[:, :4]
    exchanged[:, 8:] = (packed[:, 8:] >> 4) | (packed[:, 8:] << 4)
    yield "scales and minima exchanged", exchanged
    without = packed.copy()
    without[:, :8] &= 0x3F
    yield "high bits of scales 4 to 7 dropped", without
    bits = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), 16, 6)
    plain = (bits << np.arange(6, dtype=np.uint8)).sum(axis=2).astype(np.uint8)
    yield "read as sixteen 6-bit numbers in a row", _pack(plain[:, :8], plain[:, 8:])
    scales, mins, lows = packed[:, :4] & 0x3F, packed[:, 4:8] & 0x3F, packed[:, 8:]
    crossed = (
        np.concatenate([scales, (lows & 0x0F) | ((packed[:, 4:8] >> 2) & 0x30)], 1),
        np.concatenate([mins, (lows >> 4) | ((packed[:, :4] >> 2) & 0x30)], 1),
    )
    yield "high bits of scales 4 to 7 taken from the minima", _pack(*crossed)
    yield "the first one used for all", _pack(*(np.repeat(x[:, :1], 8, 1) for x in (scales, mins)))


_WRONG_SCALES = {
    "Q2_K": _q2_scales,
    "Q3_K": _q3_scales,
    "Q4_K": _six_bit_scales,
    "Q5_K": _six_bit_scales,
    "Q6_K": _one_byte_scales,
}


def _pack(scales: UInt8[np.ndarray, "n 8"], mins: UInt8[np.ndarray, "n 8"]) -> np.ndarray:
    """Eight 6-bit scales and minima in the 12 bytes of Q4_K and Q5_K."""
    return np.concatenate(
        [
            scales[:, :4] | ((scales[:, 4:] & 0x30) << 2),
            mins[:, :4] | ((mins[:, 4:] & 0x30) << 2),
            (scales[:, 4:] & 0x0F) | ((mins[:, 4:] & 0x0F) << 4),
        ],
        axis=1,
    )


def _without(tensor: Tensor, fields: tuple[str, ...], what: str) -> Iterator[Variant]:
    found = _blocks(tensor)
    if found is None:
        return
    blocks, layout = found
    for field in fields:
        if field in (layout.fields or {}):
            at, width = _place(layout, field)
            wrong = blocks.copy()
            wrong[:, at : at + width] = 0
            yield what, _decode(tensor, wrong)


def _place(layout: np.dtype, field: str) -> tuple[int, int]:
    assert layout.fields is not None
    dtype, at = layout.fields[field][:2]
    return at, dtype.itemsize


BLOCK_FAULTS = (
    WeightFault(
        "byte-offset", "the tensor was read from the wrong byte", _byte_offset, reference="16"
    ),
    WeightFault(
        "block-offset", "a block's header was read elsewhere", _block_offset, reference="16"
    ),
    WeightFault("block-stride", "blocks were taken to be of another size", _block_stride),
    WeightFault("half-bytes", "half-bytes were unpacked in the wrong order", _nibbles),
    WeightFault("high-bits-dropped", "the quants' high bits were left out", _high_bits),
    WeightFault(
        "offset-ignored", "the blocks' minimum or zero point was left out", _offset_ignored
    ),
    WeightFault("scale-ignored", "quants were not multiplied by the block's scale", _scale_ignored),
    WeightFault(
        "k-scales", "the superblocks' small scales were unpacked wrongly", _k_scales, True, "17"
    ),
)
