"""A block's weights: one thread fetches its weight stream ahead, eight warps read it.

The stream runs on across M-tiles, phases and layers, through a ring of shared memory. So the
weights of the next phases arrive while the blocks wait for each other.
"""

import functools
from collections.abc import Sequence

from pallas_kernels.decode_step.common.ring import Ring, RingState
from pallas_kernels.decode_step.common.work import Kinds, Work
from pallas_kernels.decode_step.few_rows.stages import Stages, longest
from pallas_kernels.decode_step.packed.plan import HEAD, StepPlan
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V

IN_FLIGHT_BYTES = 48 * 1024
"""On their way at a time, rounded up to whole stages. More fill the memory's queues, and the words
that blocks exchange come late; fewer leave it idle."""


def in_flight(stage_bytes: int) -> int:
    """Stages on their way at a time; with fewer in the ring the fetching thread could wait for
    weights whose stage has gone on, forever.
    """
    return -(-IN_FLIGHT_BYTES // stage_bytes)


class WeightRing(Ring):
    """The weights of one block, stage after stage as they lie in its stream.

    Attributes:
        cut: how each phase's M-tiles are.
    """

    def __init__(self, memory: V, turns: V, stages: int, cut: Sequence[Stages]):
        super().__init__(memory, turns, stages, longest(cut))
        self.cut = cut

    def fetch(self, plan: StepPlan, stream: V, work: Work) -> None:
        """Fetches all weights of the block in order; for one thread alone.

        Args:
            stream: address of the weight stream.
        """

        def m_tiles(phase: int, kinds: Kinds, carry: list[V]) -> list[V]:
            p, cut = plan.phases[phase], self.cut[phase]
            tiles, kind = work.tiles(p), work.kind(plan, phase, kinds)
            granules = [plan.granules(storage.name) for storage in p.storages]

            def m_tile(number: V, carry: list[V]) -> list[V]:
                each = t.integer(granules[0])
                if kind is not None:
                    mine = kind(number)
                    for n, other in enumerate(granules):
                        each = t.select(mine.equals(n), t.integer(other), each)
                return t.loop(cut.number, carry, functools.partial(stage, each))

            def stage(each: V, i: V, carry: list[V]) -> list[V]:
                granule, number, *at = carry
                state, landed = RingState(*at[:2]), RingState(*at[2:])
                size = (cut.begin(tiles, i + 1) - cut.begin(tiles, i)) * each
                late = number >= in_flight(self.stage_bytes)
                t.when(late, lambda: barriers.await_turn(self.full(landed.stage), landed.parity))
                after = self.next(landed)
                both = zip(after, landed, strict=True)
                landed = RingState(*(t.select(late, x, y) for x, y in both))
                # A stage that was never used is empty: the turn before the first is over.
                barriers.await_turn(self.empty(state.stage), state.parity ^ 1)
                barriers.copy_in(
                    self.memory + state.stage * self.stage_bytes,
                    stream + granule.wide() * plan.granule_bytes,
                    size * plan.granule_bytes,
                    self.full(state.stage),
                )
                return [granule + size, number + 1, *self.next(state), *landed]

            return t.loop(work.count[phase], carry, m_tile)

        def layer(index: V, carry: list[V]) -> list[V]:
            kinds = work.kinds(plan, index)
            for phase in range(HEAD):
                carry = m_tiles(phase, kinds, carry)
            return carry

        start = [work.granule, t.integer(0), *RingState.first(), *RingState.first()]
        m_tiles(HEAD, (), t.loop(plan.shape.layers, start, layer))
