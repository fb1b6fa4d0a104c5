"""What the warps do that don't multiply, besides fetching weights: inputs, and scales of norms."""

from collections.abc import Sequence

from pallas_kernels.decode_step.common.exchange import Exchange
from pallas_kernels.decode_step.common.launch import THREADS
from pallas_kernels.decode_step.common.ring import Ring, RingState
from pallas_kernels.decode_step.common.work import Work
from pallas_kernels.decode_step.many_rows.inputs import InputLayout
from pallas_kernels.decode_step.many_rows.layout import GRID_BARRIER, MOST_ROWS, SECTIONS, SQUARES
from pallas_kernels.decode_step.many_rows.weight_ring import Group
from pallas_kernels.decode_step.packed.plan import HEAD, StepPlan
from pallas_kernels.decode_step.packed.tile import M_TILE, WARPS
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import Format, times
from pallas_kernels.decode_step.ptx.thread import V

SCALERS = 2
"""Warps that make the scales of norms, 32 rows each."""
WITH_SCALERS = THREADS + SCALERS * t.WARP
GRID_PASSED, SCALED = t.OURS + 1, t.OURS + 2
"""Barriers of these threads: the grid barrier in front of a norm is passed; its scales are made."""
LOADS_AT_ONCE = 5
"""Sums of squares that one of their lanes loads together, four rows each."""


def fetch_inputs(
    plan: StepPlan,
    inputs: InputLayout,
    exchange: Exchange,
    work: Work,
    groups: Sequence[Group],
    ring: Ring,
    cleared: V,
) -> None:
    """Copies every stage of every input the block needs, in order; for one thread alone.

    Args:
        groups: of each phase's weights, whose stages the input's go with.
        cleared: an mbarrier whose first turn ends when the exchange has been cleared.
    """
    counter = exchange.at(GRID_BARRIER)
    barriers.await_turn(cleared, t.integer(0))

    def copied(phase: int, passed: V, carry: list[V]) -> list[V]:
        p = plan.phases[phase]
        group = groups[phase]
        first, tiles = work.part_column if p.parts > 1 else t.integer(0), work.tiles(p)
        begin = exchange.at(SECTIONS[phase])
        barriers.await_count(counter, passed * plan.blocks)
        barriers.before_copies()

        def stage(i: V, carry: list[V]) -> list[V]:
            state = RingState(*carry)
            # A stage that was never used is empty: the turn before the first is over.
            barriers.await_turn(ring.empty(state.stage), state.parity ^ 1)
            fragment = first * WARPS + i * group.sixteens
            source = begin + (fragment * inputs.fragment_bytes).wide()
            target = ring.memory + state.stage * ring.stage_bytes
            size = t.integer(group.sixteens * inputs.fragment_bytes)
            barriers.copy_in(target, source, size, ring.full(state.stage))
            return [*ring.next(state)]

        def turn(_: V, carry: list[V]) -> list[V]:
            return t.loop(group.stages(tiles), carry, stage)

        return t.loop(group.turns(work.count[phase]), carry, turn)

    def layer(index: V, carry: list[V]) -> list[V]:
        for phase in range(HEAD):
            carry = copied(phase, index * HEAD + phase, carry)
        return carry

    layers = plan.shape.layers
    copied(HEAD, t.integer(layers * HEAD), t.loop(layers, [*RingState.first()], layer))


def make_scales(plan: StepPlan, exchange: Exchange, format: Format, which: V, scales: V) -> None:
    """The scales of every norm, in order, while its product runs; for one warp.

    Eight lanes have four rows' sums of squares each of every fourth M-tile.

    Args:
        format: of the inputs of products.
        which: of the warps.
        scales: as `Step` has them.
    """
    shape, lane = plan.shape, t.thread_id() % t.WARP
    m_tiles, fours, own = shape.hidden // M_TILE, lane % 8, lane // 8
    row = which * t.WARP + fours * 4
    begin = exchange.at(SQUARES, own * MOST_ROWS + row)

    def norm(_: V, before: list[V]) -> list[V]:
        """Of four rows what the next input is made with, from what this one was made with."""
        t.block_barrier(WITH_SCALERS, GRID_PASSED)

        def some(i: V, sums: list[V]) -> list[V]:
            wanted = [own + (i * LOADS_AT_ONCE + n) * 4 for n in range(LOADS_AT_ONCE)]
            at = begin + (i * (LOADS_AT_ONCE * 4 * MOST_ROWS * 4)).wide()
            loaded = [
                t.load_global(
                    at, 4, "relaxed.gpu", where=m_tile < m_tiles, offset=n * 4 * MOST_ROWS * 4
                )
                for n, m_tile in enumerate(wanted)
            ]
            for four in loaded:
                sums = [x + y.bits() for x, y in zip(sums, four, strict=True)]
            return sums

        turns = -(-m_tiles // (4 * LOADS_AT_ONCE))
        sums = [t.warp_sum(x, (8, 16)) for x in t.loop(turns, [t.number(0)] * 4, some)]
        found = [t.rsqrt(x * (1 / shape.hidden) + shape.eps) for x in sums]
        rest = [x * t.reciprocal(y) for x, y in zip(found, before, strict=True)]
        following = [times(x, format.scale) for x in found]

        def keep() -> None:
            t.store_shared(scales + row * 4, rest)
            t.store_shared(scales + (row + MOST_ROWS) * 4, following)

        t.when(own.equals(0), keep)
        t.block_barrier_arrive(WITH_SCALERS, SCALED)
        return following

    t.loop(2 * shape.layers + 1, [t.number(1)] * 4, norm)
