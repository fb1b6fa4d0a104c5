"""Weights stored as numbers, as they are."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped, UInt32

from pallas_kernels.decode_step.packed.fragments import FRAGMENT, apart, fragments, joined, whole
from pallas_kernels.decode_step.packed.storage import Storage
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE, WARPS
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import FORMATS, Format
from pallas_kernels.decode_step.ptx.thread import V

FRAGMENT_BYTES = 2 * FRAGMENT
TILE_BYTES = WARPS * FRAGMENT_BYTES
"""Of numbers of 16 bits."""


class Numbers(Storage):
    """Numbers of one dtype as they are, fragment after fragment; kernels take those of 16 bits."""

    def __init__(self, name: str):
        self.name = name
        self.dtype = self.inputs = jnp.dtype(name)
        self.tile_bytes = M_TILE * K_TILE * self.dtype.itemsize
        self.format = FORMATS.get(name)

    def words(self, tiles: Shaped[Array, "n 16 128"]) -> UInt32[Array, "n words"]:
        return fragments(joined(tiles.astype(self.dtype)))

    def numbers(self, words: UInt32[Array, "n words"]) -> Float[Array, "n 16 128"]:
        return apart(whole(words), self.dtype)

    def load(self, tiles: V, warp: V, lane: V, there: Sequence[V | None]) -> list[list[V]]:
        at = tiles + warp * FRAGMENT_BYTES + lane * 16
        return [t.load_shared(at + n * TILE_BYTES, 4, each) for n, each in enumerate(there)]

    def expands_to(self, dtype: str) -> bool:
        return dtype == self.name and self.format is not None

    def fetch(self, tile: V, thread: V, there: V) -> list[V]:
        return t.load_global(tile + (thread << 4).wide(), 4, where=there)

    def expanded(self, words: list[V], format: Format) -> list[V]:
        return words

    def operand(self, words: list[V]) -> list[V]:
        # The memory has a lane's output first, the instruction its column.
        return [words[0], words[2], words[1], words[3]]
