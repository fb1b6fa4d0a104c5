"""Weights stored as numbers, as they are."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt32

from pallas_kernels.decode_step.packed.fragments import FRAGMENT, apart, fragments, joined, whole
from pallas_kernels.decode_step.packed.storage import Group, Read, Storage
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE, WARPS
from pallas_kernels.decode_step.ptx.formats import FORMATS
from pallas_kernels.decode_step.ptx.thread import V

FRAGMENT_BYTES = 2 * FRAGMENT
TILE_BYTES = WARPS * FRAGMENT_BYTES
"""Of numbers of 16 bits."""


class Numbers(Storage):
    """Numbers of one dtype as they are, fragment after fragment; kernels take those of 16 bits."""

    block = 1

    def __init__(self, name: str):
        self.name = name
        self.dtype = self.inputs = jnp.dtype(name)
        self.tile_bytes = M_TILE * K_TILE * self.dtype.itemsize
        self.format = FORMATS.get(name)

    @property
    def piece(self) -> int:
        return K_TILE

    def words(self, pieces: Shaped[Array, "n 16 128"]) -> UInt32[Array, "n words"]:
        return fragments(joined(pieces.astype(self.dtype)))

    def numbers(self, words: UInt32[Array, "n words"]) -> Float[Array, "n 16 128"]:
        return apart(whole(words), self.dtype)

    def load(self, read: Read, warp: V, lane: V) -> list[V]:
        return read(warp * FRAGMENT_BYTES + lane * 16, 4)

    def groups(self, words: list[V]) -> list[Group]:
        return [Group(self.operands(words))]

    def operands(self, words: list[V]) -> list[list[V]]:
        # The memory has a lane's output first, the instruction its column.
        return [[words[0], words[2], words[1], words[3]]]
