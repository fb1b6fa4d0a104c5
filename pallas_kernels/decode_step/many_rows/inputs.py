"""A product's input of many rows, in 16 bits, as the tensor cores take it from shared memory.

16 columns after 16, of which eights of rows, each as `warpgroup.multiply` takes it. A product's
columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 are columns 4 t to 4 t + 3, as storages have them. Blocks
copy some columns of all rows at a time, a stage.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import Format
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.decode_step.ptx.warpgroup import EIGHT_BYTES

MOST_STAGE_BYTES = 16 * 1024
"""Of a stage: 128 columns of 64 rows, more of fewer."""


@dataclasses.dataclass(frozen=True)
class InputLayout:
    """The layout of an input of so many rows; rows up to a multiple of eight hold anything."""

    rows: int
    format: Format

    @property
    def eights(self) -> int:
        """Times eight rows, the columns of a product."""
        return -(-self.rows // 8)

    @property
    def padded(self) -> int:
        """Rows with the ones that aren't there."""
        return 8 * self.eights

    @property
    def m_tiles_at_once(self) -> int:
        """Whose sums a warp keeps at the same time: those of 64 rows are of one."""
        return 64 // self.padded

    @property
    def fragment_bytes(self) -> int:
        """Of 16 columns."""
        return self.eights * EIGHT_BYTES

    def words(self, width: int) -> int:
        """Of an input of `width` columns."""
        return width // 16 * self.fragment_bytes // 4

    def places(self, width: int) -> Int[np.ndarray, "rows width"]:
        """Where the numbers of an input of `width` columns lie, counted in numbers."""
        row, column = np.ogrid[: self.rows, :width]
        found: np.ndarray = self._at(row, column) // 2
        return found

    def _at(self, row: Any, column: Any) -> Any:
        """Where a number lies, in bytes; the one two columns further lies half an eight further."""
        fragment = column // 16 * self.fragment_bytes + row // 8 * EIGHT_BYTES
        half = column % 4 // 2 * (EIGHT_BYTES // 2)
        return fragment + half + row % 8 * 16 + column % 16 // 4 * 4 + column % 2 * 2

    def put(self, address: V, row: V, column: V, values: list[V], kept: V | None = None) -> None:
        """Rounds and stores one number of a row, or four from a column that is a multiple of 4.

        Args:
            kept: the address of an input to store them in a second time.
        """
        offset = self._at(row, column).wide()
        places = [begin + offset for begin in (address, kept) if begin is not None]
        if len(values) == 1:
            one = self.format.pair(values[0], values[0])
            for at in places:
                t.store_global_half(at, one)
            return
        for half in range(2):
            pair = self.format.pair(*values[2 * half : 2 * half + 2])
            for at in places:
                t.store_global(at + half * (EIGHT_BYTES // 2), [pair])
