"""Arithmetic that takes one or two instructions where dialects of MLIR would take several."""

from pallas_kernels.decode_step.ptx.thread import V, asm, f32, i32


def multiply_add(a: V, b: V, c: V) -> V:
    """a b + c of float32, rounded once."""
    return asm("fma.rn.f32 $0, $1, $2, $3;", [f32()], "=f,f,f,f", a, b, c)[0]


def signed_bytes(word: V) -> list[V]:
    """Four bytes less 128 each, exactly, as two words of two float16.

    A byte below 0x64 is the float16 1024 + byte, whose last bit counts 1; 0x6480 is 1152.
    """
    text = (
        "{ .reg .b32 low, high, less; mov.b32 less, 0x64806480;"
        " prmt.b32 low, $2, 0x64646464, 0x4140; prmt.b32 high, $2, 0x64646464, 0x4342;"
        " sub.rn.f16x2 $0, low, less; sub.rn.f16x2 $1, high, less; }"
    )
    return asm(text, [i32()] * 2, "=r,=r,r", word)
