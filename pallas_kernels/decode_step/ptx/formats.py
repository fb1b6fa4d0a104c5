"""The 16-bit formats of weights and caches: numbers rounded to them, and products of them."""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.decode_step.ptx.thread import V, asm, f32, i32


@dataclasses.dataclass(frozen=True)
class Format:
    """One of them. A product's input enters as two numbers of it: rounded, and the rest.

    Attributes:
        name: as PTX has it.
        scale: what an input is multiplied with before that. Large activations of Qwen2.5 overflow
            float16, which ends at 65504; with 1/64 they may be four million.
        rest: what the rest is multiplied with besides, so that float16, which has no number below
            2^-24, keeps it: an input is off by 2^-29 at most, or by 2^-22 of itself.
    """

    name: str
    scale: float = 1.0
    rest: float = 1.0

    def pair(self, low: V, high: V) -> V:
        """Two float32 rounded, in one word."""
        return asm(f"cvt.rn.{self.name}x2.f32 $0, $1, $2;", [i32()], "=r,f,f", high, low)[0]

    def floats(self, pair: V) -> tuple[V, V]:
        """The two numbers of a word."""
        if self.name == "bf16":
            return (pair << 16).bits(), (pair & -65536).bits()
        text = (
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
            " cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
        )
        low, high = asm(text, [f32()] * 2, "=f,=f,r", pair)
        return low, high

    def split(self, low: V, high: V) -> tuple[V, V]:
        """Two numbers of an input as two pairs: rounded, and what rounding left."""
        low, high = times(low, self.scale), times(high, self.scale)
        rounded = self.pair(low, high)
        rests = [x - y for x, y in zip((low, high), self.floats(rounded), strict=True)]
        return rounded, self.pair(*(times(x, self.rest) for x in rests))

    def multiply(self, a: Sequence[V], b: Sequence[V], c: Sequence[V]) -> list[V]:
        """c + a b on the tensor cores: `[16, 16]` by `[16, 8]`, float32 sums.

        Of lane 4 g + t, a is rows g, g + 8, g, g + 8 in columns 2 t, 2 t, 2 t + 8, 2 t + 8 (and the
        next), b the same columns' rows of column g, and c rows g, g, g + 8, g + 8 in columns 2 t,
        2 t + 1, 2 t, 2 t + 1.
        """
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{self.name}.{self.name}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        return asm(text, [f32()] * 4, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", *a, *b, *c)


FORMATS = {
    "bfloat16": Format("bf16"),
    "float16": Format("f16", 1 / 64, 2**11),
}
"""By dtype."""


def times(number: V, factor: float) -> V:
    return number if factor == 1 else number * factor
