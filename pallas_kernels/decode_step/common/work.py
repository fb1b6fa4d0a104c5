"""A block's share of a step's phases, as it reads it from the plan's table."""

import dataclasses
import itertools
from collections.abc import Callable

from pallas_kernels.decode_step.packed.plan import Phase, StepPlan
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
        kinds: address of how each layer's phases are stored.
    """

    granule: V
    first: list[V]
    count: list[V]
    part: V
    part_column: V
    part_tiles: V
    kinds: V

    @classmethod
    def read(cls, table: V, cta: V, blocks: int) -> "Work":
        """The block's row of 16 numbers, of so many rows."""
        row = table + (cta << 6).wide()
        n = [v for at in range(0, 16, 4) for v in t.load_global(row + 4 * at, 4)]
        return cls(n[0], n[1:11:2], n[2:11:2], n[11], n[12], n[13], table + 64 * blocks)

    def tiles(self, phase: Phase) -> int | V:
        """In each of the block's M-tiles: of its part, where the columns are cut into parts."""
        return self.part_tiles if phase.parts > 1 else phase.across

    def kind(self, plan: StepPlan, phase: int, layer: V) -> Callable[[V], V] | None:
        """Which of a phase's storages each of the block's M-tiles has in a layer; None where it has
        but one in any.
        """
        this = plan.phases[phase]
        if len(this.storages) == 1:
            return None
        kinds = self._kinds(phase, layer)

        def of(m_tile: V) -> V:
            shift = t.integer(0)
            for n, begin in enumerate(this.begins[1:], 1):
                shift = t.select(self.first[phase] + m_tile < begin, shift, t.integer(4 * n))
            return (kinds >> shift) & 15

        return of

    def granules(self, plan: StepPlan, phase: int, layer: V) -> Callable[[V], V]:
        """How many granules a tile of each of so many of the block's M-tiles, its first ones,
        takes in all in a layer.
        """
        this = plan.phases[phase]
        each = [plan.granules(storage.name) for storage in this.storages]
        if len(each) == 1:
            return lambda count: count * each[0]
        kinds, first = self._kinds(phase, layer), self.first[phase]

        def of(count: V) -> V:
            total = t.integer(0)
            for n, (begin, end) in enumerate(itertools.pairwise((*this.begins, this.m_tiles))):
                inside = t.smaller(first + count, end) - t.larger(first, begin)
                mine, which = t.integer(each[0]), (kinds >> (4 * n)) & 15
                for other, size in enumerate(each[1:], 1):
                    mine = t.select(which.equals(other), t.integer(size), mine)
                total = total + t.larger(inside, 0) * mine
            return total

        return of

    def _kinds(self, phase: int, layer: V) -> V:
        """Which of a phase's storages each segment has in a layer, four bits each."""
        return t.load_global(self.kinds + ((layer * 4 + phase) << 2).wide())[0]
