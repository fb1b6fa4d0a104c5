"""What block formats multiply their codes with: float16 numbers, or small integers times such."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Shaped, UInt32

from pallas_kernels.decode_step.packed.planes import GROUPS
from pallas_kernels.decode_step.packed.storage import Read
from pallas_kernels.decode_step.packed.tile import M_TILE
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.arithmetic import bytes_times, permuted, scaled_halves
from pallas_kernels.decode_step.ptx.formats import FORMATS
from pallas_kernels.decode_step.ptx.thread import V

FLOAT16 = FORMATS["float16"]

AVERAGED = 16
"""Inputs whose mean an addend is multiplied with, so many times."""

Fields = Mapping[str, Shaped[Array, "n 16 ..."]]
"""A tile's numbers by name, of each output: `codes` [n, 16, 128], and what scales are made of."""


Two = tuple[V, V]
"""Of outputs g and g + 8."""


class Scales(abc.ABC):
    """Those of a tile.

    Attributes:
        tile_bytes: that they take.
        names: of `Fields`.
    """

    tile_bytes: int
    names: tuple[str, ...]

    @abc.abstractmethod
    def packed(self, fields: Fields) -> UInt32[Array, "n words"]:
        """Words of tiles."""

    @abc.abstractmethod
    def numbers(
        self, words: UInt32[Array, "n words"]
    ) -> tuple[Float32[Array, "n 16 each"], Float32[Array, "n 16 each"] | None]:
        """Factors and addends, each for an equal share of the 128 inputs."""

    @abc.abstractmethod
    def load(self, read: Read, begin: int, group: V, g: V) -> list[V]:
        """What a lane needs, of a tile whose scales begin at that byte."""

    @abc.abstractmethod
    def factors(self, words: list[V]) -> list[Two]:
        """What codes are multiplied with: one for 32 inputs, or one for each half of them."""

    def zeros(self, words: list[V]) -> Two | None:
        """What codes are less by, twice in a word as float16, where that differs."""
        return None

    @property
    def adds(self) -> bool:
        """Whether there are addends."""
        return {"m", "mins"} & {*self.names} != set()

    def addends(self, words: list[V]) -> list[Two]:
        """What is added then, of as many inputs, where there are addends."""
        raise NotImplementedError

    def load_addends(self, reads: Sequence[Read], begin: int, lane: V) -> list[V]:
        """Of a lane 4 g + t, of both tiles, what the addends of group t are made of; where there
        are none, of as much as factors times a number.
        """
        raise NotImplementedError

    def addend_operand(self, words: list[V], number: int) -> tuple[list[V], Two]:
        """From them: of each tile outputs g and g + 8, as two float16, each to be multiplied with
        the mean of 16 inputs; and what products of them are multiplied with then.

        Args:
            number: that factors are multiplied with to be addends, where there are none.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Halves(Scales):
    """Of 32 inputs d in float16, and m where the format has one: a weight is d q + m.

    In the order [group, g]: d of outputs g and g + 8 in a word, then m likewise.
    """

    minimum: bool = False

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("d", "m") if self.minimum else ("d",)

    @property
    def tile_bytes(self) -> int:  # type: ignore[override]
        return M_TILE * GROUPS * 2 * len(self.names)

    def packed(self, fields: Fields) -> UInt32[Array, "n words"]:
        words = [_both(fields[name]) for name in self.names]  # [n, 8, 4]
        return jnp.stack(words, axis=-1).swapaxes(1, 2).reshape(len(words[0]), -1)

    def numbers(
        self, words: UInt32[Array, "n words"]
    ) -> tuple[Float32[Array, "n 16 4"], Float32[Array, "n 16 4"] | None]:
        each = words.reshape(len(words), GROUPS, 8, len(self.names)).swapaxes(1, 2)
        d, *m = (_floats(each[..., i]) for i in range(len(self.names)))
        return d, m[0] if m else None

    def load(self, read: Read, begin: int, group: V, g: V) -> list[V]:
        count = len(self.names)
        return read((group * 8 + g) * (4 * count) + begin, count)

    def factors(self, words: list[V]) -> list[Two]:
        return [FLOAT16.floats(words[0])]

    def addends(self, words: list[V]) -> list[Two]:
        return [FLOAT16.floats(words[1])]

    def load_addends(self, reads: Sequence[Read], begin: int, lane: V) -> list[V]:
        count = len(self.names)
        at = (lane % 4 * 8 + lane // 4) * (4 * count) + (begin + 4 * (count - 1))
        return [word for read in reads for word in read(at, 1)]

    def addend_operand(self, words: list[V], number: int) -> tuple[list[V], Two]:
        operand = [permuted(w, w, half) for w in words for half in (0x1010, 0x3232)]
        times = t.number(AVERAGED if self.minimum else AVERAGED * number)
        return operand, (times, times)


@dataclasses.dataclass(frozen=True)
class Zeros(Scales):
    """Of 32 inputs d in float16 and a zero point, a whole number: a weight is d (q - zero).

    In the order [group, g]: d of outputs g and g + 8 in a word, then their zero points in the two
    lowest bytes of another.

    Attributes:
        offset: of codes, which zero points are counted from.
    """

    offset: int = 0
    names = ("d", "zeros")
    tile_bytes = M_TILE * GROUPS * 4

    def packed(self, fields: Fields) -> UInt32[Array, "n words"]:
        zeros = fields["zeros"].astype(jnp.uint32)
        words = [_both(fields["d"]), zeros[:, :8] | zeros[:, 8:] << 8]  # [n, 8, 4]
        return jnp.stack(words, axis=-1).swapaxes(1, 2).reshape(len(zeros), -1)

    def numbers(
        self, words: UInt32[Array, "n words"]
    ) -> tuple[Float32[Array, "n 16 4"], Float32[Array, "n 16 4"]]:
        d, zeros = jnp.moveaxis(words.reshape(len(words), GROUPS, 8, 2).swapaxes(1, 2), -1, 0)
        both = jnp.concatenate([zeros & 0xFF, zeros >> 8], axis=1).astype(jnp.float32)
        # All products are exact, and so is the difference of two of them.
        return _floats(d), _floats(d) * (self.offset - both)

    def load(self, read: Read, begin: int, group: V, g: V) -> list[V]:
        return read((group * 8 + g) * 8 + begin, 2)

    def factors(self, words: list[V]) -> list[Two]:
        return [FLOAT16.floats(words[0])]

    def zeros(self, words: list[V]) -> Two:
        # A byte is the last of a float16 of 1024.
        above = t.integer(0x6464_6464)
        low, high = (permuted(words[1], above, which) for which in (0x4040, 0x4141))
        less = -1024 - self.offset
        return scaled_halves(low, 1, less), scaled_halves(high, 1, less)


@dataclasses.dataclass(frozen=True)
class Integers(Scales):
    """Whole numbers of 16 or 32 inputs, times d of a row; and others times dmin, the minima.

    In the order [group, g] first the whole numbers, a byte each and with `offset` added; then, in
    the order [g], d of outputs g and g + 8 in a word, and -dmin likewise. The bytes of a group are,
    first g then g + 8, its scales and then its minima, if all are of 32 inputs; of 16 inputs those
    of the first and then of the second; half bytes have the scale low, the minimum high. Without
    minima and of 32 inputs they are half a word, and groups 2 n and 2 n + 1 share one.

    Attributes:
        each: inputs, 16 or 32.
        minimum: whether there are minima.
        offset: of scales.
    """

    each: int
    minimum: bool
    offset: int = 0

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("d", "scales", *(("dmin", "mins") if self.minimum else ()))

    @property
    def _shared(self) -> bool:
        return self.each == 32 and not self.minimum

    @property
    def _integer_bytes(self) -> int:
        return GROUPS * 8 * (2 if self._shared else 4)

    @property
    def tile_bytes(self) -> int:  # type: ignore[override]
        return self._integer_bytes + M_TILE * (4 if self.minimum else 2)

    def packed(self, fields: Fields) -> UInt32[Array, "n words"]:
        scales = (fields["scales"] + np.uint8(self.offset)).astype(jnp.uint32)
        if self.each == 16 and self.minimum:
            scales = scales | fields["mins"].astype(jnp.uint32) << 4
        both = scales.reshape(len(scales), 2, 8, GROUPS, -1)  # [n, half, g, group, each]
        rest = [both]
        if self.each == 32 and self.minimum:
            rest.append(fields["mins"].astype(jnp.uint32).reshape(both.shape))
        kinds = jnp.concatenate(rest, axis=-1).transpose(0, 3, 2, 4, 1)
        if self._shared:  # [n, two groups, g, group, half]
            kinds = kinds.reshape(len(scales), GROUPS // 2, 2, 8, 2).swapaxes(2, 3)
        bytes_ = kinds.reshape(len(scales), -1, 4)
        words = jnp.sum(bytes_ << np.arange(0, 32, 8, dtype=np.uint32), -1, dtype=jnp.uint32)
        signs = {"d": 0, "dmin": 0x8000} if self.minimum else {"d": 0}
        halves = [fields[name] ^ np.uint16(sign) for name, sign in signs.items()]
        rows = [_both(each[..., None])[..., 0] for each in halves]
        return jnp.concatenate([words, jnp.stack(rows, axis=-1).reshape(len(words), -1)], axis=1)

    def numbers(
        self, words: UInt32[Array, "n words"]
    ) -> tuple[Float32[Array, "n 16 each"], Float32[Array, "n 16 each"] | None]:
        n, count = len(words), self._integer_bytes // 4
        each = ((words[:, :count, None] >> np.arange(0, 32, 8, dtype=np.uint32)) & 0xFF).astype(
            jnp.uint8
        )
        if self._shared:
            grid = each.reshape(n, GROUPS // 2, 8, 2, 2).swapaxes(2, 3)
            grid = grid.reshape(n, GROUPS, 8, 1, 2)
        else:
            grid = each.reshape(n, GROUPS, 8, 2, 2)
        grid = grid.transpose(0, 4, 2, 1, 3).reshape(n, M_TILE, GROUPS, -1)  # [n, out, group, kind]
        tail = words[:, count:].reshape(n, 8, -1)
        d = _floats(tail[..., :1])

        def times(numbers: Shaped[Array, "n 16 4 kinds"], by: Float32[Array, "n 16 1"]) -> Array:
            return by * numbers.astype(jnp.float32).reshape(n, M_TILE, -1)

        if not self.minimum:
            return times((grid - np.uint8(self.offset)).view(jnp.int8), d), None
        negative = _floats(tail[..., 1:])
        if self.each == 16:
            return times(grid & 0x0F, d), times(grid >> 4, negative)
        return times(grid[..., :1], d), times(grid[..., 1:], negative)

    def load(self, read: Read, begin: int, group: V, g: V) -> list[V]:
        count = 2 if self.minimum else 1
        rows = read(g * (4 * count) + begin + self._integer_bytes, count)
        if self._shared:
            (word,) = read((group // 2 * 8 + g) * 4 + begin, 1)
            return [word >> ((group & 1) << 4), *rows]
        return [*read((group * 8 + g) * 4 + begin, 1), *rows]

    def factors(self, words: list[V]) -> list[Two]:
        word = words[0] & 0x0F0F0F0F if self.each == 16 and self.minimum else words[0]
        return self._times(word, range(0, 32 // self.each * 2, 2), words[1], self.offset)

    def addends(self, words: list[V]) -> list[Two]:
        if self.each == 32:
            return self._times(words[0], [2], words[2])
        return self._times((words[0] >> 4) & 0x0F0F0F0F, [0, 2], words[2])

    def _times(self, word: V, firsts: Sequence[int], by: V, offset: int = 0) -> list[Two]:
        """The bytes from each of `firsts` on, less the offset, times a float16 each."""
        low, high = (
            bytes_times(word, [n + half for n in firsts], each, offset)
            for half, each in enumerate(FLOAT16.floats(by))
        )
        return [*zip(low, high, strict=True)]

    def load_addends(self, reads: Sequence[Read], begin: int, lane: V) -> list[V]:
        g, group = lane // 4, lane % 4
        words = [word for read in reads for word in read((group * 8 + g) * 4 + begin, 1)]
        # Both tiles are of one block, whose d and dmin each has.
        count = 2 if self.minimum else 1
        at = g * (4 * count) + (begin + self._integer_bytes + 4 * (count - 1))
        return words + reads[0](at, 1)

    def addend_operand(self, words: list[V], number: int) -> tuple[list[V], Two]:
        *tiles, rows = words
        if self.each == 16 and self.minimum:
            tiles = [(word >> 4) & 0x0F0F0F0F for word in tiles]
        # A byte is the last of a float16 of 1024.
        selectors, above = (0x4240, 0x4341) if self.each == 16 else (0x4242, 0x4343), 0x6464_6464
        pairs = (permuted(word, t.integer(above), at) for word in tiles for at in selectors)
        low, high = FLOAT16.floats(rows)
        if self.minimum:
            return [scaled_halves(pair, AVERAGED, -1024 * AVERAGED) for pair in pairs], (low, high)
        whole = [scaled_halves(pair, 1, -1024 - self.offset) for pair in pairs]
        return whole, (low * (AVERAGED * number), high * (AVERAGED * number))


def _both(halves: Shaped[Array, "n 16 m"]) -> UInt32[Array, "n 8 m"]:
    """The bits of outputs g and g + 8 in a word."""
    bits = halves.astype(jnp.uint32)
    return bits[:, :8] | bits[:, 8:] << 16


def _floats(words: UInt32[Array, "n 8 m"]) -> Float32[Array, "n 16 m"]:
    bits = jnp.concatenate([words & 0xFFFF, words >> 16], axis=1).astype(jnp.uint16)
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
