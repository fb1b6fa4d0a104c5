"""Arithmetic that takes one or two instructions where dialects of MLIR would take several."""

import struct
from collections.abc import Sequence

from pallas_kernels.decode_step.ptx.thread import V, asm, f32, i32, integer


def multiply_add(a: V, b: V, c: V) -> V:
    """a b + c of float32, rounded once."""
    return asm("fma.rn.f32 $0, $1, $2, $3;", [f32()], "=f,f,f,f", a, b, c)[0]


def permuted(a: V, b: V, selector: int | V) -> V:
    """Four of the bytes of b a; each by three of the selector's four bits, lowest first."""
    return asm("prmt.b32 $0, $1, $2, $3;", [i32()], "=r,r,r,r", a, b, integer(selector))[0]


def placed(word: V, mask: int, bits: int | V) -> V:
    """Some bits of a word among others: (word & mask) | bits, in one instruction."""
    text = "lop3.b32 $0, $1, $2, $3, 0xEA;"
    return asm(text, [i32()], "=r,r,r,r", word, integer(mask), integer(bits))[0]


def scaled_halves(pair: V, factor: float, addend: float) -> V:
    """Two float16 times a power of two and a number added, rounded once."""
    if factor == 1:
        return asm("add.rn.f16x2 $0, $1, $2;", [i32()], "=r,r,r", pair, _twice(addend))[0]
    both = _twice(factor), _twice(addend)
    return asm("fma.rn.f16x2 $0, $1, $2, $3;", [i32()], "=r,r,r,r", pair, *both)[0]


def less_halves(pair: V, other: V) -> V:
    """Two float16 less two others, rounded once."""
    return asm("sub.rn.f16x2 $0, $1, $2;", [i32()], "=r,r,r", pair, other)[0]


def multiplied_halves(pair: V, factors: V, addends: V | None = None) -> V:
    """Two float16 times two others, and two more added, rounded once."""
    if addends is None:
        return asm("mul.rn.f16x2 $0, $1, $2;", [i32()], "=r,r,r", pair, factors)[0]
    text = "fma.rn.f16x2 $0, $1, $2, $3;"
    return asm(text, [i32()], "=r,r,r,r", pair, factors, addends)[0]


def _twice(number: float) -> V:
    """A float16 twice in a word."""
    (half,) = struct.unpack("<H", struct.pack("<e", number))
    return integer(struct.unpack("<i", struct.pack("<HH", half, half))[0])


def signed_bytes(word: V) -> list[V]:
    """Four bytes less 128 each, exactly, as two words of two float16.

    A byte below 0x64 is the float16 1024 + byte, whose last bit counts 1.
    """
    above = integer(0x6464_6464)
    pairs = (permuted(word, above, selector) for selector in (0x4140, 0x4342))
    return [scaled_halves(pair, 1, -1024 - 128) for pair in pairs]


def bytes_times(word: V, which: Sequence[int], by: V, offset: int = 0) -> list[V]:
    """Some of the four bytes less an offset, each times a float32 of eleven bits, exactly.

    Between 0x470000 and a byte of zeros it is the float32 2^15 + byte.
    """
    above, less = integer(0x4700_0000), by * -float(2**15 + offset)
    parts = (permuted(word, above, 0x7404 | n << 4).bits() for n in which)
    return [multiply_add(part, by, less) for part in parts]
