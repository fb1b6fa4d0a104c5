"""A ring of slots in shared memory, filled by copies ahead of the warps that read them."""

from typing import NamedTuple

from pallas_kernels.decode_step.packed.packing import WARPS
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V


class Place(NamedTuple):
    """Where a reader or whoever fetches stands: a slot of the ring and its turn's parity."""

    slot: V
    parity: V

    @classmethod
    def begin(cls) -> "Place":
        return cls(t.integer(0), t.integer(0))


class Ring:
    """The slots of one block.

    Attributes:
        memory: address of the `stages` slots, in shared memory, of `slot_bytes` each.
        turns: address of two mbarriers a slot: that it is full, and that all warps have read it.
    """

    def __init__(self, memory: V, turns: V, stages: int, slot_bytes: int):
        self.memory, self.turns = memory, turns
        self.stages, self.slot_bytes = stages, slot_bytes

    def make(self) -> None:
        """Sets up the barriers; one thread calls this, and all others wait for it."""
        for slot in range(self.stages):
            barriers.make_barrier(self.full(t.integer(slot)), 1)
            barriers.make_barrier(self.empty(t.integer(slot)), WARPS)
        barriers.barriers_made()

    def full(self, slot: V) -> V:
        return self.turns + slot * 16

    def empty(self, slot: V) -> V:
        return self.turns + slot * 16 + 8

    def next(self, place: Place) -> Place:
        wraps = place.slot.equals(self.stages - 1)
        slot = t.select(wraps, t.integer(0), place.slot + 1)
        return Place(slot, t.select(wraps, place.parity ^ 1, place.parity))

    def wait(self, place: Place) -> V:
        """Waits until the slot at hand is full and returns its address."""
        barriers.await_turn(self.full(place.slot), place.parity)
        return self.memory + place.slot * self.slot_bytes

    def release(self, place: Place) -> None:
        """This warp has read the slot."""
        t.warp_together()
        t.when((t.me() % t.WARP).equals(0), lambda: barriers.arrive(self.empty(place.slot)))
