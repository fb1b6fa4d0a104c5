"""A block's share of a step's phases, as it reads it from the plan's table."""

import dataclasses

from pallas_kernels.decode_step.packed.plan import Phase
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V


@dataclasses.dataclass(frozen=True)
class Work:
    """What `StepPlan.table` says of a block.

    Attributes:
        granule: its first one in the weight stream.
        first, count: its M-tiles of each phase.
        part: its part of the down projection.
        part_column, part_tiles: that part's first column and its length, in tiles.
    """

    granule: V
    first: list[V]
    count: list[V]
    part: V
    part_column: V
    part_tiles: V

    @classmethod
    def read(cls, table: V, cta: V) -> "Work":
        """The block's row of 16 numbers."""
        row = table + (cta << 6).wide()
        n = [v for at in range(0, 16, 4) for v in t.load_global(row + 4 * at, 4)]
        return cls(n[0], n[1:11:2], n[2:11:2], *n[11:14])

    def tiles(self, phase: Phase) -> int | V:
        """In each of the block's M-tiles: of its part, where the columns are cut into parts."""
        return self.part_tiles if phase.parts > 1 else phase.across
