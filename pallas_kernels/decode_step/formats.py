"""The 16-bit formats of weights and caches: numbers rounded to them, and products of them."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.decode_step.thread import V, asm, f32, i32


@dataclasses.dataclass(frozen=True)
class Format:
    """One of them.

    Attributes:
        name: as PTX has it.
        scale: a power of two that a product's input is multiplied with before it is rounded. Large
            activations of Qwen2.5 overflow float16, which ends at 65504; with 1/64 it takes
            those up to four million, and what is left below 2^-25 of a number is 2^-19.
    """

    name: str
    scale: float

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
        """Two float32 as two pairs: rounded, and what rounding left."""
        rounded = self.pair(low, high)
        nearest = self.floats(rounded)
        return rounded, self.pair(low - nearest[0], high - nearest[1])

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


FORMATS = {"bfloat16": Format("bf16", 1.0), "float16": Format("f16", 1 / 64)}


def format_of(dtype: DTypeLike) -> Format:
    return FORMATS[jnp.dtype(dtype).name]
