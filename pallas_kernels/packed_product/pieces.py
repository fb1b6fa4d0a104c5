"""A product, and its pieces of work: some M-tiles by some rows, over some of the columns."""

import dataclasses

from pallas_kernels.decode_step.packed.storage import Storage
from pallas_kernels.decode_step.packed.storages import STORAGES
from pallas_kernels.decode_step.packed.tile import M_TILE
from pallas_kernels.decode_step.ptx.formats import Format
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.packed_product.tiling import M_TILES, Tiling


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a product.

    Attributes:
        stored: the weights' storage.
        m_tiles: of them, of `across` tiles each.
        rows: of the other operand.
        halves_apart: whether an M-tile holds outputs of both halves.
        granule_bytes: of the stream.
    """

    stored: str
    m_tiles: int
    across: int
    rows: int
    halves_apart: bool
    granule_bytes: int

    @property
    def storage(self) -> Storage:
        return STORAGES[self.stored]

    @property
    def format(self) -> Format:
        format = self.storage.format
        assert format is not None, "refused before"
        return format

    @property
    def outs(self) -> int:
        return self.m_tiles * M_TILE


@dataclasses.dataclass(frozen=True)
class Piece:
    """One of a product's pieces of work, by its number.

    Blocks that work side by side have the same weights, which they then read from the memory once.
    """

    shape: Shape
    tiling: Tiling
    number: V

    @property
    def row_block(self) -> V:
        return self.number % self.tiling.row_blocks(self.shape.rows)

    @property
    def _rest(self) -> V:
        return self.number // self.tiling.row_blocks(self.shape.rows)

    @property
    def split(self) -> V:
        return self._rest % self.tiling.splits

    @property
    def first_m_tile(self) -> V:
        return self._rest // self.tiling.splits * M_TILES

    @property
    def tiles(self) -> tuple[V, V]:
        """The first of an M-tile's tiles, and the one after the last."""
        splits, across = self.tiling.splits, self.shape.across
        begin, end = (self.split + n for n in (0, 1))
        return begin * across // splits, end * across // splits
