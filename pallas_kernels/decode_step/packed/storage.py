"""How weights are stored, apart from what products of them are taken in and what a cache holds.

A storage says how many bytes a tile has, how numbers get there and back, in which format products
with it are taken, and how a lane finds its operands. Which matrix has which, the plan says.
"""

import abc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt32

from pallas_kernels.decode_step.ptx.formats import Format
from pallas_kernels.decode_step.ptx.thread import V

Read = Callable[[V, int], list[V]]
"""So many words of a tile, from a byte on."""


class Group(NamedTuple):
    """Some of a lane's weights under one scale.

    Attributes:
        operands: the first one of `Format.multiply`, of each product in turn. Of its 16 inputs, the
            columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 are the inputs 4 t to 4 t + 3.
        scales: what the four numbers of the products' sum are multiplied with, if anything.
    """

    operands: list[list[V]]
    scales: list[V] | None = None


class Storage(abc.ABC):
    """One way to store weights. A tile is whole 32 bytes, since a stream is counted in granules of
    as many at least, of which there may be 2^31.

    Attributes:
        name: in `STORAGES`.
        tile_bytes: of a tile in the stream.
        tiles: that come together where a matrix is put into the stream.
        block: inputs of an output that are stored together, of which a matrix has whole ones.
        spread: tiles that a block's eight warps take together; so many times 16 inputs are a
            warp's.
        units: what the products of `groups` count, of outputs g and of outputs g + 8; powers of
            two.
        addends: whether numbers are added to what `groups` makes, the same for 16 or 32 inputs.
            They are multiplied with means of inputs.
        dtype: of the numbers that are read back, which has every one of them exactly.
        inputs: what the definition of correct rounds a product's input to.
        format: in which the kernels take products; without one they don't.
    """

    name: str
    tile_bytes: int
    tiles: int = 1
    block: int
    spread: int = 1
    units: tuple[float, float] = (1.0, 1.0)
    addends: bool = False
    dtype: jnp.dtype
    inputs: jnp.dtype
    format: Format | None

    @property
    @abc.abstractmethod
    def piece(self) -> int:
        """How much a matrix has for an output's inputs of `tiles` tiles, in numbers or bytes."""

    @abc.abstractmethod
    def words(self, pieces: Shaped[Array, "n 16 piece"]) -> UInt32[Array, "n words"]:
        """Tiles as the stream has them, from what a matrix has for each output's inputs of
        `tiles` tiles. Zeros, be they numbers or bytes, are weights of zero.
        """

    @abc.abstractmethod
    def numbers(self, words: UInt32[Array, "n words"]) -> Float[Array, "n 16 128"]:
        """The weights of tiles."""

    @abc.abstractmethod
    def load(self, read: Read, warp: V, lane: V) -> list[V]:
        """A lane's words of the tile that its warp takes, of `spread` tiles in turn."""

    @abc.abstractmethod
    def groups(self, words: list[V]) -> list[Group]:
        """A lane's weights from them; `spread` operands in all."""

    @abc.abstractmethod
    def operands(self, words: list[V]) -> list[list[V]]:
        """The operands of the lane's weights themselves, scales and addends included, each rounded
        to `format` as weights of it would be.
        """

    def load_addends(self, reads: Sequence[Read], lane: V) -> list[V]:
        """A lane's words of the addends of two tiles, next to each other in an M-tile."""
        raise NotImplementedError

    def addend_group(self, words: list[V]) -> Group:
        """From them the operand whose inputs are sums of 16: of the first tile, then the second."""
        raise NotImplementedError
