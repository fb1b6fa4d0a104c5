"""How a product is cut into pieces of work: some M-tiles by some rows, over some of the columns."""

from typing import NamedTuple

from pallas_kernels.decode_step.packed.tile import WARPS

M_TILES = WARPS
"""A piece's, one to a warp."""
MOST_ROWS = 256
"""A piece's: as many columns has the widest product of a warpgroup."""
FEWEST_TILES = 4
"""Of a piece's columns, since it takes a while to begin and to end."""


class Tiling(NamedTuple):
    """A product's.

    Attributes:
        rows: of a piece, a multiple of eight.
        splits: pieces that each add up some of the columns alone; XLA adds up theirs.
    """

    rows: int
    splits: int

    @classmethod
    def of(cls, m_tiles: int, across: int, rows: int, blocks: int) -> "Tiling":
        """The one that keeps all blocks busy: of so many M-tiles of `across` tiles and so many
        rows.

        The narrower a product, the more of its time it takes to read its operands. Sums that are
        added up later are written and read.
        """
        groups = -(-m_tiles // M_TILES)
        padded = -(-rows // 8) * 8
        wide = {min(padded, MOST_ROWS // n) for n in (1, 2, 4)}

        def cost(tiling: Tiling) -> float:
            pieces = groups * -(-rows // tiling.rows) * tiling.splits
            tiles = -(-across // tiling.splits)
            turns = -(-pieces // blocks)
            alone = 1.0 if tiling.splits == 1 else 2.0 * tiling.splits
            return turns * (tiles * (tiling.rows + 64) + 4 * tiling.rows * alone / tiling.splits)

        most = max(1, across // FEWEST_TILES)
        possible = [cls(n, splits) for n in wide for splits in range(1, min(most, 8) + 1)]
        return min(possible, key=cost)

    def row_blocks(self, rows: int) -> int:
        return -(-rows // self.rows)
