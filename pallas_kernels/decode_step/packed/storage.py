"""How weights are stored, apart from what products of them are taken in and what a cache holds.

A storage says how many bytes a tile has, how numbers get there and back, in which format products
with it are taken, and how a lane finds its operand. Which phase has which, the plan says.
"""

import abc
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt32

from pallas_kernels.decode_step.ptx.formats import Format
from pallas_kernels.decode_step.ptx.thread import V


class Storage(abc.ABC):
    """One way to store weights. A tile is whole 16 bytes, since bulk copies are.

    Attributes:
        name: in `STORAGES`.
        tile_bytes: of a tile in the stream.
        dtype: of the numbers that are read back, which has every one of them exactly.
        inputs: what the definition of correct rounds a product's input to.
        format: in which the kernels take products; without one they don't.
    """

    name: str
    tile_bytes: int
    dtype: jnp.dtype
    inputs: jnp.dtype
    format: Format | None

    @abc.abstractmethod
    def words(self, tiles: Shaped[Array, "n 16 piece"]) -> UInt32[Array, "n words"]:
        """Tiles as the stream has them, from what a matrix has for each output's 128 inputs."""

    @abc.abstractmethod
    def numbers(self, words: UInt32[Array, "n words"]) -> Float[Array, "n 16 128"]:
        """The weights of tiles."""

    @abc.abstractmethod
    def load(self, tiles: V, warp: V, lane: V, there: Sequence[V | None]) -> list[list[V]]:
        """A lane's words of some tiles, one after the other in shared memory.

        Args:
            there: of each tile, whether it is; its words are zeroes where not.
        """

    @abc.abstractmethod
    def operand(self, words: list[V]) -> list[V]:
        """The first operand of `Format.multiply`, from the words that `load` gave for a tile.

        Its columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 are the inputs 4 t to 4 t + 3 of the warp.
        """

    @abc.abstractmethod
    def expands_to(self, dtype: str) -> bool:
        """Whether `expanded` makes weights of that dtype, besides `numbers`."""

    @abc.abstractmethod
    def fetch(self, tile: V, thread: V, there: V) -> list[V]:
        """What `load` gives one of 256 threads, of a tile in global memory."""

    @abc.abstractmethod
    def expanded(self, words: list[V], format: Format) -> list[V]:
        """The lane's weights from them, rounded: four of output g, two a word, then of g + 8."""

    def scales(self, words: list[V]) -> list[V] | None:
        """What the four numbers of a product with `operand` are multiplied with, if anything."""
        return None
