"""Blocks of 32 or 64 values under one scale, and the ternary formats.

A block is declared as a structured dtype, field by field as in ggml-common.h; its decoder takes
`n` blocks and returns their values in float32. The arithmetic follows ggml-quants.c operation by
operation, so the results are equal to the last bit.

The values come in parts: all that are low half-bytes, say, then all that are high ones. Where a
sum over them is wanted their order is nobody's concern, and to restore it costs XLA on a CPU ten
times what the rest does.

Decoders are array code for whatever holds the fields: NumPy's arrays on the host, JAX's inside a
compiled program (`weights.on_device`), where a product and the sum that takes it become one
operation. No bit depends on that: every product that is added to or subtracted from is exact.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from jax import lax
from jaxtyping import Float32, Shaped, UInt8

Blocks = Shaped[np.ndarray, "n"] | Mapping[str, Any]
"""`n` blocks, or anything else that gives their fields by name as arrays of first axis `n`."""

Values = Float32[np.ndarray, "n ..."]

Parts = tuple[Float32[np.ndarray, "n groups *run"], ...]
"""A block's values: of each group a run from every part in turn. One part is [n, ...]."""


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """How the bytes of one block lie, and how `n` of them become float32.

    Attributes:
        parts: from the fields that `apart` gives to `Parts`, in NumPy's arrays or in JAX's.
        apart: from `Blocks` to the same fields, but with scales that share bytes taken apart. Where
            blocks are decoded again and again, this is done once: few numbers, and half the time.
    """

    layout: np.dtype
    parts: Callable[[Any], Any]
    apart: Callable[[Any], Any] = lambda blocks: blocks

    def values(self, fields: Any) -> Any:
        """From what `apart` gives to `Values`, a block's values in order."""
        parts = self.parts(fields)
        return parts[0] if len(parts) == 1 else namespace(parts[0]).stack(parts, axis=2)

    def decode(self, blocks: Any) -> Any:
        """From `Blocks` to `Values`."""
        return self.values(self.apart(blocks))


def layout(*fields: tuple) -> np.dtype:
    """Packed little-endian fields: (name, type) or (name, type, shape)."""
    return np.dtype(list(fields))


def namespace(array: Any) -> ModuleType:
    """The module whose functions take such an array: numpy or jax.numpy."""
    return array.__array_namespace__()


def look_up(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The table's entries, in the place of their codes."""
    return namespace(codes).take(table, codes, axis=0)


def scale(halves: np.ndarray, trailing: int = 1) -> Float32[np.ndarray, "n ..."]:
    """One float16 per block as float32 [n, 1, ...], ready to multiply."""
    return halves.astype(np.float32).reshape(-1, *[1] * trailing)


def once(array: Any) -> Any:
    """The same, computed before what uses it: else XLA does so for each value it goes into."""
    return array if isinstance(array, np.ndarray) else lax.optimization_barrier(array)


def halves(packed: UInt8[np.ndarray, "n m"], run: int) -> tuple[UInt8[np.ndarray, "n g r"], ...]:
    """The low half-bytes of each `run` of bytes, and the high ones."""
    grouped = packed.reshape(len(packed), -1, run)
    return grouped & 0x0F, grouped >> 4


def quarters(packed: UInt8[np.ndarray, "n m"], run: int) -> tuple[UInt8[np.ndarray, "n g r"], ...]:
    """The four 2-bit fields of each `run` of bytes, the lowest first."""
    grouped = packed.reshape(len(packed), -1, run)
    return tuple((grouped >> shift) & 3 for shift in (0, 2, 4, 6))


def nibbles(packed: UInt8[np.ndarray, "n m"], run: int) -> UInt8[np.ndarray, "n groups 2 run"]:
    """Splits each `run` of bytes into its low, then its high half-bytes."""
    return namespace(packed).stack(halves(packed, run), axis=2)


def fields2(packed: UInt8[np.ndarray, "n m"], run: int) -> UInt8[np.ndarray, "n groups 4 run"]:
    """Splits each `run` of bytes into its four 2-bit fields, lowest first."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (packed.reshape(len(packed), -1, 1, run) >> shifts) & 3


def bits(packed: UInt8[np.ndarray, "n m"]) -> UInt8[np.ndarray, "n eight_m"]:
    """Every byte's eight bits, lowest first."""
    return namespace(packed).unpackbits(packed, axis=-1, bitorder="little")


# An e2m1 float doubled, so that it is an integer; the scale tables below are halved to match.
# https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_E8M0_HALVED = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


def _ue4m3_halved() -> Float32[np.ndarray, "256"]:
    """An unsigned e4m3 byte (bias 7) times 0.5; its top bit is ignored and 0x7F means zero."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    value = np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / 8, exponent - 7)
    )
    value[0x7F] = 0
    return (value / 2).astype(np.float32)


_UE4M3_HALVED = _ue4m3_halved()
_POWERS_OF_3 = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]


def _q4_0(blocks: Blocks) -> Parts:
    d = scale(blocks["d"], 2)
    return tuple(d * (q.view(np.int8) - np.int8(8)) for q in halves(blocks["qs"], 16))


def _q4_1(blocks: Blocks) -> Parts:
    d, m = scale(blocks["d"], 2), scale(blocks["m"], 2)
    return tuple(d * q + m for q in halves(blocks["qs"], 16))


_BIT = np.arange(32, dtype=np.uint32)


def _five_bits(blocks: Blocks) -> Iterator[UInt8[np.ndarray, "n 1 16"]]:
    # Once, or else XLA on a CPU shifts a word anew for each value, four times slower.
    high = once((blocks["qh"][:, None, None] >> _BIT).astype(np.uint8) & 1)
    for part, low in enumerate(halves(blocks["qs"], 16)):
        yield low | (high[:, :, 16 * part : 16 * (part + 1)] << 4)


def _q5_0(blocks: Blocks) -> Parts:
    d = scale(blocks["d"], 2)
    return tuple(d * (q.view(np.int8) - np.int8(16)) for q in _five_bits(blocks))


def _q5_1(blocks: Blocks) -> Parts:
    d, m = scale(blocks["d"], 2), scale(blocks["m"], 2)
    return tuple(d * q + m for q in _five_bits(blocks))


def _q8_0(blocks: Blocks) -> Parts:
    return (scale(blocks["d"]) * blocks["qs"],)


def _tq1_0(blocks: Blocks) -> Parts:
    """Five ternary digits a byte (four in `qh`), read as the top digit of byte x 3^k mod 256."""
    qs, qh = blocks["qs"], blocks["qh"]
    n = len(qs)
    digits = namespace(qs).concatenate(
        [
            (qs[:, None, :32] * _POWERS_OF_3).reshape(n, 160),
            (qs[:, None, 32:] * _POWERS_OF_3).reshape(n, 80),
            (qh[:, None] * _POWERS_OF_3[:4]).reshape(n, 16),
        ],
        axis=1,
    )
    ternary = ((digits.astype(np.uint16) * 3) >> 8).astype(np.int8) - np.int8(1)
    return (scale(blocks["d"]) * ternary,)


def _tq2_0(blocks: Blocks) -> Parts:
    d = scale(blocks["d"], 2)
    return tuple(d * (q.view(np.int8) - np.int8(1)) for q in quarters(blocks["qs"], 32))


def _mxfp4(blocks: Blocks) -> Parts:
    d = look_up(_E8M0_HALVED, blocks["e"])[:, None, None]
    return tuple(d * look_up(_E2M1, codes) for codes in halves(blocks["qs"], 16))


def _nvfp4(blocks: Blocks) -> Parts:
    d = look_up(_UE4M3_HALVED, blocks["d"])[:, :, None]
    return tuple(d * look_up(_E2M1, codes) for codes in halves(blocks["qs"], 8))


FORMATS = {
    Type.Q4_0: BlockFormat(layout(("d", "<f2"), ("qs", "u1", 16)), _q4_0),
    Type.Q4_1: BlockFormat(layout(("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)), _q4_1),
    Type.Q5_0: BlockFormat(layout(("d", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)), _q5_0),
    Type.Q5_1: BlockFormat(
        layout(("d", "<f2"), ("m", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)), _q5_1
    ),
    Type.Q8_0: BlockFormat(layout(("d", "<f2"), ("qs", "i1", 32)), _q8_0),
    Type.TQ1_0: BlockFormat(layout(("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")), _tq1_0),
    Type.TQ2_0: BlockFormat(layout(("qs", "u1", 64), ("d", "<f2")), _tq2_0),
    Type.MXFP4: BlockFormat(layout(("e", "u1"), ("qs", "u1", 16)), _mxfp4),
    Type.NVFP4: BlockFormat(layout(("d", "u1", 4), ("qs", "u1", 32)), _nvfp4),
}
