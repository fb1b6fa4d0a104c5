"""A product's input of many rows, in 16 bits, as the tensor cores take it.

16 columns after 16, of which pairs of eight rows, of which 32 lanes. Lane 4 g + t has columns 4 t
to 4 t + 3 of row g of both eights, its operands of two products in 16 bytes. Blocks copy some
columns of all rows at a time, a stage.
"""

import dataclasses

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import Format
from pallas_kernels.decode_step.ptx.thread import V

PAIR_BYTES = t.WARP * 16
MOST_STAGE_BYTES = 16 * 1024
"""Of a stage: 128 columns of 64 rows, more of fewer."""


@dataclasses.dataclass(frozen=True)
class InputLayout:
    """The layout of an input of so many rows; rows up to a multiple of 16 hold anything."""

    rows: int
    format: Format

    @property
    def eights(self) -> int:
        """Times eight rows, the columns of a product."""
        return -(-self.rows // 8)

    @property
    def pairs(self) -> int:
        """Pairs of eight rows."""
        return -(-self.eights // 2)

    @property
    def padded(self) -> int:
        """Rows with the ones that aren't there."""
        return 16 * self.pairs

    @property
    def m_tiles_at_once(self) -> int:
        """Whose sums a warp keeps at the same time: those of 64 rows are of one."""
        return 64 // self.padded

    @property
    def fragment_bytes(self) -> int:
        """Of 16 columns."""
        return self.pairs * PAIR_BYTES

    def words(self, width: int) -> int:
        """Of an input of `width` columns."""
        return width // 16 * self.fragment_bytes // 4

    def _at(self, row: V, column: V) -> V:
        """Where a number lies, in bytes."""
        fragment = column // 16 * self.fragment_bytes + row // 16 * PAIR_BYTES
        lane = row % 8 * 4 + column % 16 // 4
        return fragment + lane * 16 + row // 8 % 2 * 8 + column % 4 * 2

    def put(self, address: V, row: V, column: V, values: list[V]) -> None:
        """Rounds and stores one number of a row, or four from a column that is a multiple of 4."""
        at = address + self._at(row, column).wide()
        if len(values) == 1:
            t.store_global_half(at, self.format.pair(values[0], values[0]))
            return
        t.store_global(at, [self.format.pair(*values[:2]), self.format.pair(*values[2:])])
