"""Codes of few bits in planes: the same bits of every code together, as lanes take them.

Four lanes 4 g to 4 g + 3 of a warp have 64 weights, 16 each: outputs g and g + 8 in 32 inputs,
which are two tensor-core products. In the order [t, j, c, half, e] these are input
16 j + 4 t + 2 c + e of output 8 half + g, and e = 0 and 1 are one word of an operand.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8, UInt32

from pallas_kernels.decode_step.packed.storage import Read
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.arithmetic import placed, scaled_halves
from pallas_kernels.decode_step.ptx.thread import V

GROUP = 32
"""Inputs whose weights a warp takes together."""
GROUPS = K_TILE // GROUP
SPREAD = 2
"""Tiles that a block's eight warps take together."""
WEIGHTS = 64
"""Of four lanes."""

APART = 4
"""Bits by which the codes of outputs g + 8 lie higher than those of outputs g, in planes and in
float16 alike: so both are moved at once."""

_MAGIC = 0x6400_6400
"""Two float16 of 1024, whose last ten bits count 1, 2 and so on."""


@dataclasses.dataclass(frozen=True)
class Plane:
    """Some bits of each code; a tile has them in the order [group, g, word].

    A lane of four has its words one after the other; one bit of each of 16 codes is half a word,
    that of lanes 0 and 2 the lower half.
    """

    bits: int

    @property
    def words(self) -> int:
        """Of four lanes."""
        return WEIGHTS * self.bits // 32

    @property
    def tile_bytes(self) -> int:
        return M_TILE * K_TILE * self.bits // 8

    @functools.cached_property
    def places(self) -> tuple[Int[np.ndarray, "64"], Int[np.ndarray, "64"]]:
        """The word and the shift of each of the 64 codes."""
        t, j, c, half, e = np.unravel_index(np.arange(WEIGHTS), (4, 2, 2, 2, 2))
        match self.bits:
            case 8:
                return t * 4 + j * 2 + half, 8 * (2 * c + e)
            case 4:
                return t * 2 + j, 8 * c + APART * half + 16 * e
            case 2:
                return t, 8 * j + 2 * c + APART * half + 16 * e
            case _:
                return t // 2, j + 2 * c + APART * half + 8 * e + 16 * (t % 2)

    def packed(self, codes: UInt8[Array, "n 4 8 64"]) -> UInt32[Array, "n words"]:
        """Words of tiles, from these bits of codes in the order of four lanes."""
        word, shift = self.places
        order = np.lexsort((shift, word))
        sorted_ = codes[..., order].astype(jnp.uint32).reshape(*codes.shape[:-1], self.words, -1)
        shifted = sorted_ << shift[order].reshape(self.words, -1).astype(np.uint32)
        return jnp.sum(shifted, axis=-1, dtype=jnp.uint32).reshape(len(codes), -1)

    def codes(self, words: UInt32[Array, "n words"]) -> UInt8[Array, "n 4 8 64"]:
        """The same, back again."""
        word, shift = self.places
        grouped = words.reshape(len(words), GROUPS, 8, self.words)[..., word]
        return ((grouped >> shift.astype(np.uint32)) & ((1 << self.bits) - 1)).astype(jnp.uint8)

    def load(self, read: Read, begin: int, group: V, lane: V) -> list[V]:
        """A lane's words; of one-bit codes half a word, twice: the low byte is that of every e = 0,
        the third that of every e = 1.
        """
        here = group * (8 * self.words) + begin // 4
        if self.bits > 1:
            each = self.words // 4
            return read((here + lane * each) * 4, each)
        (word,) = read((here + lane // 2) * 4, 1)
        half = word >> ((lane & 1) << 4)
        return [(half & 0xFF) | ((half & 0xFF00) << 8)]

    def at(self, j: int, c: int) -> tuple[int, int]:
        """Of a lane's codes of output g: the word and the place in it of e = 0; e = 1 is 16 bits
        further.
        """
        return (
            (j, 8 * c) if self.bits == 4 else (0, (8 * j + 2 * c) if self.bits == 2 else j + 2 * c)
        )


def four_lanes(weights: UInt8[Array, "n 16 128"]) -> UInt8[Array, "n 4 8 64"]:
    """Tiles' numbers in the order of four lanes."""
    grid = weights.reshape(len(weights), 2, 8, GROUPS, 2, 4, 2, 2)
    # [n, half, g, group, j, t, c, e]
    return grid.transpose(0, 3, 2, 5, 4, 6, 1, 7).reshape(len(weights), GROUPS, 8, WEIGHTS)


def outputs(lanes: UInt8[Array, "n 4 8 64"]) -> UInt8[Array, "n 16 128"]:
    """The same, back again."""
    grid = lanes.reshape(len(lanes), GROUPS, 8, 4, 2, 2, 2, 2)
    return grid.transpose(0, 6, 2, 1, 4, 3, 5, 7).reshape(len(lanes), M_TILE, K_TILE)


def pairs(planes: list[tuple[Plane, list[V]]], offset: int) -> list[V]:
    """The codes of a lane less an offset, exactly, two float16 a word: the eight pairs in order.

    Args:
        planes: with their words, the lowest bits' first; six bits in all at most.
    """
    made = _placed(planes, _MAGIC)
    units = (2.0 ** -(APART * (n % 2)) for n in range(len(made)))
    return [
        scaled_halves(pair, unit, -1024 * unit - offset)
        for pair, unit in zip(made, units, strict=True)
    ]


def subnormal_pairs(planes: list[tuple[Plane, list[V]]]) -> list[V]:
    """The same codes as the last bits of float16, for which nothing needs to be done: they count
    `SUBNORMAL_UNITS`, those of outputs g and those of outputs g + 8.
    """
    return _placed(planes, 0)


SUBNORMAL_UNITS = (2.0**-24, 2.0 ** (APART - 24))


def _placed(planes: list[tuple[Plane, list[V]]], among: int) -> list[V]:
    """Each pair's codes among other bits: of outputs g from the lowest bit on, of g + 8 higher."""
    made = []
    for j, c, half in itertools.product(range(2), repeat=3):
        value: int | V = among
        low = 0
        for plane, words in planes:
            word, at = plane.at(j, c)
            mask = _both(((1 << plane.bits) - 1) << (low + APART * half))
            moved = _moved(words[word], at - low)
            value = placed(moved, mask, value) if among or low else moved & mask
            low += plane.bits
        made.append(t.integer(value))
    return made


def _moved(word: V, down: int) -> V:
    if down == 0:
        return word
    return word >> down if down > 0 else word << -down


def _both(half: int) -> int:
    """In both halves of a word, as a signed number."""
    return half | half << 16
