"""A block's share of a step's phases, as it reads it from the plan's table."""

import dataclasses
import itertools
from collections.abc import Callable

from pallas_kernels.decode_step.packed.plan import Phase, StepPlan
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V

Kinds = tuple[V, ...]
"""Of each of a layer's phases, which of its storages each segment has, four bits each, the first
segment's lowest; nothing where all phases have but one."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What `StepPlan.table` says of a block.

    Attributes:
        granule: its first one in the weight stream.
        first, count: its M-tiles of each phase.
        part: its part of the down projection.
        part_column, part_tiles: that part's first column and its length, in tiles.
        kinds_at: address of every layer's `Kinds`.
    """

    granule: V
    first: list[V]
    count: list[V]
    part: V
    part_column: V
    part_tiles: V
    kinds_at: V

    @classmethod
    def read(cls, table: V, cta: V, blocks: int) -> "Work":
        """The block's row of 16 numbers, of so many rows."""
        row = table + (cta << 6).wide()
        n = [v for at in range(0, 16, 4) for v in t.load_global(row + 4 * at, 4)]
        return cls(n[0], n[1:11:2], n[2:11:2], n[11], n[12], n[13], table + 64 * blocks)

    def tiles(self, phase: Phase) -> int | V:
        """In each of the block's M-tiles: of its part, where the columns are cut into parts."""
        return self.part_tiles if phase.parts > 1 else phase.across

    def kinds(self, plan: StepPlan, layer: V) -> Kinds:
        """How a layer's phases are stored; loaded at once, and early, since it takes a while."""
        if all(len(phase.storages) == 1 for phase in plan.phases):
            return ()
        return tuple(t.load_global(self.kinds_at + (layer << 4).wide(), 4))

    def kind(self, plan: StepPlan, phase: int, kinds: Kinds) -> Callable[[V], V] | None:
        """Which of a phase's storages each of the block's M-tiles has in a layer; None where it has
        but one in any.
        """
        this = plan.phases[phase]
        if len(this.storages) == 1:
            return None

        def of(m_tile: V) -> V:
            shift = t.integer(0)
            for n, begin in enumerate(this.begins[1:], 1):
                shift = t.select(self.first[phase] + m_tile < begin, shift, t.integer(4 * n))
            return (kinds[phase] >> shift) & 15

        return of

    def granules(self, plan: StepPlan, phase: int, kinds: Kinds) -> Callable[[V], V]:
        """How many granules a tile of each of so many of the block's M-tiles, its first ones,
        takes in all in a layer.
        """
        this = plan.phases[phase]
        each = [plan.granules(storage.name) for storage in this.storages]
        if len(each) == 1:
            return lambda count: count * each[0]
        first = self.first[phase]

        def of(count: V) -> V:
            total = t.integer(0)
            for n, (begin, end) in enumerate(itertools.pairwise((*this.begins, this.m_tiles))):
                inside = t.smaller(first + count, end) - t.larger(first, begin)
                mine, which = t.integer(each[0]), (kinds[phase] >> (4 * n)) & 15
                for other, size in enumerate(each[1:], 1):
                    mine = t.select(which.equals(other), t.integer(size), mine)
                total = total + t.larger(inside, 0) * mine
            return total

        return of
