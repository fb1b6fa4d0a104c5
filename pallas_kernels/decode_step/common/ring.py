"""A ring of stages in shared memory, filled by copies ahead of the warps that read them."""

from typing import NamedTuple

from pallas_kernels.decode_step.packed.tile import WARPS
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V


class RingState(NamedTuple):
    """Where a reader or whoever fetches stands: a stage of the ring and its turn's parity."""

    stage: V
    parity: V

    @classmethod
    def first(cls) -> "RingState":
        return cls(t.integer(0), t.integer(0))


class Ring:
    """The stages of one block.

    Attributes:
        memory: address of the `stages`, in shared memory, of `stage_bytes` each.
        turns: address of two mbarriers a stage: that it is full, and that all warps have read it.
    """

    def __init__(self, memory: V, turns: V, stages: int, stage_bytes: int):
        self.memory, self.turns = memory, turns
        self.stages, self.stage_bytes = stages, stage_bytes

    def make(self) -> None:
        """Sets up the barriers; one thread calls this, and all others wait for it."""
        for stage in range(self.stages):
            barriers.make_barrier(self.full(t.integer(stage)), 1)
            barriers.make_barrier(self.empty(t.integer(stage)), WARPS)
        barriers.barriers_made()

    def full(self, stage: V) -> V:
        return self.turns + stage * 16

    def empty(self, stage: V) -> V:
        return self.turns + stage * 16 + 8

    def next(self, state: RingState) -> RingState:
        wraps = state.stage.equals(self.stages - 1)
        stage = t.select(wraps, t.integer(0), state.stage + 1)
        return RingState(stage, t.select(wraps, state.parity ^ 1, state.parity))

    def wait(self, state: RingState) -> V:
        """Waits until the stage at hand is full and returns its address."""
        barriers.await_turn(self.full(state.stage), state.parity)
        return self.memory + state.stage * self.stage_bytes

    def release(self, state: RingState) -> None:
        """This warp has read the stage."""
        t.warp_barrier()
        t.when((t.thread_id() % t.WARP).equals(0), lambda: barriers.arrive(self.empty(state.stage)))
