"""Weights as a file's blocks have them: codes of few bits in planes, and their scales.

A file's blocks are 17 to 36 bytes for 32 inputs of an output, or 84 to 210 for 256; none of their
fields lies where a lane could load it. What is stored is their bits, in another order.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Shaped, UInt8, UInt32

from pallas_kernels.decode_step.packed.planes import (
    GROUPS,
    SPREAD,
    SUBNORMAL_UNITS,
    Plane,
    four_lanes,
    outputs,
    pairs,
    subnormal_pairs,
)
from pallas_kernels.decode_step.packed.scales import FLOAT16, Fields, Scales, Two
from pallas_kernels.decode_step.packed.storage import Group, Read, Storage
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.arithmetic import (
    less_halves,
    multiplied_halves,
    permuted,
    placed,
    scaled_halves,
    signed_bytes,
)
from pallas_kernels.decode_step.ptx.formats import times
from pallas_kernels.decode_step.ptx.thread import V

Parse = Callable[[UInt8[Array, "n 16 bytes"]], Fields]
"""Some blocks' fields: `codes`, then what `Scales` takes, of each output."""


def _twice(low: V, high: V) -> Two:
    """Numbers of outputs g and g + 8 rounded to float16, each in both halves of a word."""
    return FLOAT16.pair(low, low), FLOAT16.pair(high, high)


@dataclasses.dataclass(frozen=True)
class Blocks(Storage):
    """One block format. A weight is a scale times its code less `offset` or a zero point, or times
    the `table`'s entry for it, and an addend where the format has one.

    Since codes are exact in float16, no weight is rounded: products of codes are added up in
    float32, then multiplied by their scale; the addend is multiplied with the inputs' mean. So is
    the offset, which is an addend like any, but for codes of eight bits, whose sums would be far
    larger than what is left of them.

    Attributes:
        block_bytes: of a block in the file.
        block: inputs of it.
        bits: of the planes, the lowest bits' plane first.
    """

    name: str
    block_bytes: int
    block: int
    parse: Parse
    bits: tuple[int, ...]
    scales: Scales
    offset: int = 0
    table: tuple[int, ...] | None = None

    # As wide as d q is, and as an input that enters with its rest nearly is.
    dtype = inputs = jnp.dtype(jnp.float32)
    format = FLOAT16
    spread = SPREAD

    @property
    def tiles(self) -> int:  # type: ignore[override]
        return max(1, self.block // K_TILE)

    @property
    def piece(self) -> int:
        return self.tiles * K_TILE // self.block * self.block_bytes

    @property
    def planes(self) -> tuple[Plane, ...]:
        return tuple(map(Plane, self.bits))

    @property
    def _code_bytes(self) -> int:
        return sum(plane.tile_bytes for plane in self.planes)

    @property
    def tile_bytes(self) -> int:  # type: ignore[override]
        return self._code_bytes + self.scales.tile_bytes

    @property
    def addends(self) -> bool:  # type: ignore[override]
        return self.scales.adds or (self.offset > 0 and self.bits != (8,))

    def words(self, pieces: UInt8[Array, "n 16 piece"]) -> UInt32[Array, "n words"]:
        blocks = pieces.reshape(len(pieces) * M_TILE, -1, self.block_bytes)
        fields = self.parse(blocks)  # [n 16, blocks, ...]
        tiles = {name: self._of_tiles(name, x, len(pieces)) for name, x in fields.items()}
        codes = four_lanes(tiles.pop("codes"))
        low, made = 0, []
        for plane in self.planes:
            made.append(plane.packed((codes >> low) & np.uint8((1 << plane.bits) - 1)))
            low += plane.bits
        words = jnp.concatenate([*made, self.scales.packed(tiles)], axis=1)
        return words.reshape(len(pieces), -1)

    def _of_tiles(self, name: str, field: Shaped[Array, "..."], pieces: int) -> Any:
        """A field by tiles: `[n, 16, each]`, or `[n, 16]` of what a row has one of."""
        if self.tiles > 1 and field.ndim == 2:
            field = jnp.broadcast_to(field[..., None], (*field.shape, self.tiles))
            each: tuple[int, ...] = ()
        else:
            each = (-1,)
        # [pieces, 16, tiles, each]
        grid = field.reshape(pieces, M_TILE, self.tiles, -1).swapaxes(1, 2)
        return grid.reshape(pieces * self.tiles, M_TILE, *each)

    def scales_of(
        self, words: UInt32[Array, "n words"]
    ) -> tuple[Float32[Array, "n 16 128"], Float32[Array, "n 16 128"] | None]:
        """What each weight's code is multiplied with, and what is added then where products with
        that are taken apart: a minimum, or the offset times the factor."""
        factor, addend = self.scales.numbers(words[:, self._code_bytes // 4 :])
        if not self.scales.adds:
            addend = factor * -self.offset if self.addends else None

        def each(of_group: Float32[Array, "n 16 groups"]) -> Float32[Array, "n 16 128"]:
            return jnp.repeat(of_group, K_TILE // of_group.shape[-1], axis=-1)

        return each(factor), None if addend is None else each(addend)

    def numbers(self, words: UInt32[Array, "n words"]) -> Float32[Array, "n 16 128"]:
        n, begin = len(words), 0
        codes, low = jnp.zeros((n, GROUPS, 8, 64), jnp.uint8), 0
        for plane in self.planes:
            end = begin + plane.tile_bytes // 4
            codes |= plane.codes(words[:, begin:end]) << low
            begin, low = end, low + plane.bits
        factor, addend = self.scales.numbers(words[:, begin:])
        grid = outputs(codes).reshape(n, M_TILE, factor.shape[2], -1)
        if self.table is None:
            levels = grid.astype(jnp.float32) - self.offset
        else:
            levels = jnp.asarray(self.table, jnp.float32)[grid]
        values = factor[..., None] * levels
        if addend is not None:
            values = values + addend[..., None]
        return values.reshape(n, M_TILE, K_TILE)

    def load(self, read: Read, warp: V, lane: V) -> list[V]:
        group, begin, words = warp % GROUPS, 0, []
        for plane in self.planes:
            words += plane.load(read, begin, group, lane)
            begin += plane.tile_bytes
        return words + self.scales.load(read, begin, group, lane // 4)

    @property
    def units(self) -> tuple[float, float]:  # type: ignore[override]
        # Codes that are whole numbers as they are.
        return SUBNORMAL_UNITS if self.addends else (1.0, 1.0)

    def groups(self, words: list[V]) -> list[Group]:
        if self.addends:
            planes, rest = self._planes(words)
            codes = subnormal_pairs(planes)
        else:
            codes, rest = self._codes(words, self.offset)
        factors = self.scales.factors(rest)
        each = 2 // len(factors)
        operands = [codes[:4], codes[4:]]
        return [
            Group(operands[n * each : (n + 1) * each], [a, a, b, b])
            for n, (a, b) in enumerate(factors)
        ]

    def operands(self, words: list[V]) -> list[list[V]]:
        # About the middle of the codes addends are small, and so is what rounding them costs.
        middle = 1 << (sum(self.bits) - 1) if self.scales.adds else 0
        codes, rest = self._codes(words, self.offset + middle)
        factors, addends = self.scales.factors(rest), None
        if self.scales.adds:
            both = zip(factors, self.scales.addends(rest), strict=True)
            addends = [_twice(a * middle + m, b * middle + n) for (a, b), (m, n) in both]
        factors = [_twice(*two) for two in factors]
        made = []
        for n, pair in enumerate(codes):
            # Of each operand four words: outputs g, g + 8, g, g + 8.
            which, half = n // 4 * len(factors) // 2, n % 2
            added = addends[which][half] if addends else None
            made.append(multiplied_halves(pair, factors[which][half], added))
        return [made[:4], made[4:]]

    def load_addends(self, reads: Sequence[Read], lane: V) -> list[V]:
        return self.scales.load_addends(reads, self._code_bytes, lane)

    def addend_group(self, words: list[V]) -> Group:
        operand, scales = self.scales.addend_operand(words, -self.offset)
        a, b = (times(x, unit) for x, unit in zip(scales, self.units, strict=True))
        return Group([operand], [a, a, b, b])

    def _planes(self, words: list[V]) -> tuple[list[tuple[Plane, list[V]]], list[V]]:
        """Each plane's words, and those of scales."""
        planes, rest = [], words
        for plane in self.planes:
            count = max(1, plane.words // 4)
            planes.append((plane, rest[:count]))
            rest = rest[count:]
        return planes, rest

    def _codes(self, words: list[V], offset: int) -> tuple[list[V], list[V]]:
        """The eight pairs of codes less an offset in float16, and the words of scales."""
        planes, rest = self._planes(words)
        if self.bits == (8,):
            codes = [*self._of_bytes(planes[0][1])]
        elif self.table is not None:
            codes = [*self._looked_up(planes[0][1])]
        else:
            codes = pairs(planes, offset)
        if zeros := self.scales.zeros(rest):
            codes = [less_halves(pair, zeros[n % 2]) for n, pair in enumerate(codes)]
        return codes, rest

    def _of_bytes(self, words: list[V]) -> Iterator[V]:
        for first, second in zip(words[::2], words[1::2], strict=True):
            low, high = signed_bytes(first), signed_bytes(second)
            yield from (low[0], high[0], low[1], high[1])

    def _looked_up(self, words: list[V]) -> Iterator[V]:
        """Half bytes looked up in the table, of which four registers have the 16 entries + 128."""
        assert self.table is not None
        entries = np.asarray(self.table, np.int8).view(np.uint8) ^ 0x80
        table = [t.integer(int(x)) for x in entries.view(np.int32)]
        for word in words:
            index = word & 0x7777_7777
            upper = placed(word >> 1, 0x4444_4444, 0x3210_3210)
            looked = []
            for half in (0, 16):
                at, pick = index >> half, upper >> half
                low, high = permuted(table[0], table[1], at), permuted(table[2], table[3], at)
                looked.append(permuted(low, high, pick))
            for pair in range(4):
                both = permuted(looked[0], looked[1], pair | (4 + pair) << 8)
                yield scaled_halves(placed(both, 0x00FF_00FF, 0x6400_6400), 1, -1024 - 128)
