"""Weights in the order in which many rows need them: some columns of all M-tiles at hand, then
more.

A stage is 64 columns or more of each of a group of M-tiles, so that stages differ in size. Of each
M-tile they are copied by themselves, since the M-tiles lie one after the other in the stream. In
the ring a stage is in one piece.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pallas_kernels.decode_step.common.ring import Ring, RingState
from pallas_kernels.decode_step.common.work import Kinds, Work
from pallas_kernels.decode_step.many_rows.inputs import MOST_STAGE_BYTES, InputLayout
from pallas_kernels.decode_step.packed.plan import HEAD, Phase, StepPlan
from pallas_kernels.decode_step.packed.tile import WARPS
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V

MOST_M_TILES = 24
"""Whose sums of 64 rows fit in the registers of eight warps: three to a warp."""
MOST_SUMS = 96
"""A lane's."""
USUAL_M_TILES = 16
"""Where several groups are needed."""
PIECES = 4
"""Of a unit: each is one warp's, with 16 or 32 columns."""
MOST_UNITS = 4
"""Of an M-tile in a stage."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """What stages have whole numbers of: half a tile of numbers, or a whole one of blocks.

    Attributes:
        bytes: room for any.
        tile: how many a tile has.
        sixteens: times 16 columns in a piece.
    """

    bytes: int
    tile: int
    sixteens: int

    @classmethod
    def of(cls, plan: StepPlan) -> "Unit":
        sixteens = max(storage.spread for storage in plan.storages)
        tile = WARPS // (PIECES * sixteens)
        return cls(max(storage.tile_bytes for storage in plan.storages) // tile, tile, sixteens)


@dataclasses.dataclass(frozen=True)
class Group:
    """How a phase's M-tiles are divided among the warps, some at a time.

    Attributes:
        unit: that stages have whole numbers of.
        m_tiles: that are multiplied at the same time, at most.
        units: of an M-tile in a stage.
        sharers: warps that share an M-tile, one or two; each has some of its columns.
        each: M-tiles of a warp.
    """

    unit: Unit
    m_tiles: int
    units: int
    sharers: int
    each: int

    @classmethod
    def of(cls, phase: Phase, unit: Unit, room: int, inputs: InputLayout) -> "Group":
        """Numbers take longer to fetch than to multiply: three stages of a tile at most fit into
        the ring, of `room` units. Blocks take longer to multiply: stages are as long as two fit,
        since each is waited for, and warps share M-tiles so that all have as much to do, as far as
        registers allow. Where segments are stored otherwise, a warp has one.
        """
        most, numbers = int(phase.count.max()), unit.sixteens == 1
        turns = 1 if most <= MOST_M_TILES else -(-most // USUAL_M_TILES)
        m_tiles = -(-most // turns)
        input_bytes = PIECES * unit.sixteens * inputs.fragment_bytes
        longest = min(
            unit.tile if numbers else MOST_UNITS,
            room // ((3 if numbers else 2) * m_tiles),
            MOST_STAGE_BYTES // input_bytes,
        )
        lengths = np.diff(phase.part_begin) * unit.tile
        units = max(n for n in range(1, max(longest, 1) + 1) if (lengths % n == 0).all())
        each = {n: -(-m_tiles // (WARPS // n)) for n in (1, 2)}
        alone = len(phase.begins) > 1 and len(phase.storages) > 1
        most_each = 1 if alone else MOST_SUMS // (4 * inputs.eights)

        def cost(sharers: int) -> tuple[float, ...]:
            own = each[sharers]
            # To add up what sharers found takes an eighth of what an M-tile takes.
            return (own, own / sharers) if numbers else (own / sharers + own / 8,)

        sharers = min((n for n, own in each.items() if n == 1 or own <= most_each), key=cost)
        return cls(unit, m_tiles, units, sharers, each[sharers])

    @property
    def stage_bytes(self) -> int:
        """Room for the largest."""
        return self.m_tiles * self.units * self.unit.bytes

    @property
    def pieces(self) -> int:
        """Of an M-tile in a stage."""
        return PIECES * self.units

    @property
    def sixteens(self) -> int:
        """Times 16 columns in a stage."""
        return self.pieces * self.unit.sixteens

    def stages(self, tiles: int | V) -> int | V:
        """Of a group of M-tiles of so many tiles."""
        return tiles * self.unit.tile // self.units

    def turns(self, m_tiles: V) -> V:
        return (m_tiles + (self.m_tiles - 1)) // self.m_tiles

    def at_hand(self, m_tiles: V, turn: V) -> V:
        return t.smaller(m_tiles - turn * self.m_tiles, self.m_tiles)


class WeightState(NamedTuple):
    """Where a reader or the fetching warp stands: a stage, and its first unit in the ring."""

    stage: V
    parity: V
    unit: V

    @classmethod
    def first(cls) -> "WeightState":
        return cls(*RingState.first(), t.integer(0))

    @property
    def of_ring(self) -> RingState:
        return RingState(self.stage, self.parity)


class WeightRing:
    """The weights of one block, stage after stage.

    Attributes:
        groups: of each phase.
        units: address of a ring of `room` units in shared memory.
        ring: of stages: their barriers, and in its memory how many units each takes.
    """

    def __init__(self, groups: Sequence[Group], units: V, room: int, ring: Ring):
        self.groups, self.unit, self.ring = groups, groups[0].unit, ring
        self.units, self.room = units, room

    def address(self, state: WeightState, units: V) -> V:
        """Of a stage of so many units: all of its first M-tile, then all of the next."""
        return self.units + self._begin(state, units) * self.unit.bytes

    def next(self, state: WeightState, units: V) -> WeightState:
        return WeightState(*self.ring.next(state.of_ring), self._begin(state, units) + units)

    def _begin(self, state: WeightState, units: V) -> V:
        """Its first unit: not the next one where the ring ends too soon after it."""
        return t.select(state.unit + units > self.room, t.integer(0), state.unit)

    def fetch(self, plan: StepPlan, stream: V, work: Work) -> None:
        """Fetches all weights of the block in order; for one warp, each lane an M-tile."""
        lane = t.thread_id() % t.WARP

        def m_tiles(phase: int, kinds: Kinds, carry: list[V]) -> list[V]:
            p = plan.phases[phase]
            group, count = self.groups[phase], work.count[phase]
            tiles, granules = t.integer(work.tiles(p)), work.granules(plan, phase, kinds)

            def turn(i: V, carry: list[V]) -> list[V]:
                at_hand, first = group.at_hand(count, i), i * group.m_tiles
                before, after = granules(first + lane), granules(first + lane + 1)
                own = (after - before) * (plan.granule_bytes * group.units // self.unit.tile)
                all_ = granules(first + at_hand) - granules(first)
                size = all_ * (plan.granule_bytes * group.units // self.unit.tile)
                begin = stream + (carry[0] + before * tiles).wide() * plan.granule_bytes

                def stage(i: V, carry: list[V]) -> list[V]:
                    source = begin + (i * own).wide()
                    return self._fetch_stage(source, group, own, at_hand, size, carry)

                return [carry[0], *t.loop(group.stages(tiles), carry[1:], stage)]

            carry = t.loop(group.turns(count), carry, turn)
            return [carry[0] + granules(count) * tiles, *carry[1:]]

        def layer(index: V, carry: list[V]) -> list[V]:
            kinds = work.kinds(plan, index)
            for phase in range(HEAD):
                carry = m_tiles(phase, kinds, carry)
            return carry

        none = [*WeightState.first(), *RingState.first(), t.integer(self.room), t.integer(0)]
        m_tiles(HEAD, (), t.loop(plan.shape.layers, [work.granule, *none], layer))

    def _fetch_stage(
        self, source: V, group: Group, own: V, m_tiles: V, size: V, carry: list[V]
    ) -> list[V]:
        """One stage of so many M-tiles and bytes, of which this lane's own are there.

        `carry` is the stage's state, the oldest stage's, free units of the ring, and how many
        stages are in it.
        """
        ring, lane = self.ring, t.thread_id() % t.WARP

        state, units = WeightState(*carry[:3]), m_tiles * group.units
        left = t.select(state.unit + units > self.room, self.room - state.unit, t.integer(0))
        taken = left + units

        def crowded(oldest: list[V]) -> V:
            return (oldest[2] < taken) | oldest[3].equals(ring.stages)

        def let_go(oldest: list[V]) -> list[V]:
            last = RingState(*oldest[:2])
            barriers.await_turn(ring.empty(last.stage), last.parity)
            (freed,) = t.load_shared(ring.memory + last.stage * ring.stage_bytes)
            return [*ring.next(last), oldest[2] + freed, oldest[3] - 1]

        *oldest, free, stages = t.loop_while(crowded, carry[3:], let_go)
        full = ring.full(state.stage)
        # A lane may not have read yet how many units the stage last had.
        t.warp_barrier()

        def announce() -> None:
            t.store_shared(ring.memory + state.stage * ring.stage_bytes, [taken])
            barriers.expect(full, size)

        t.when(lane.equals(0), announce)
        t.warp_barrier()
        target = self.address(state, units) + lane * (group.units * self.unit.bytes)
        t.when(lane < m_tiles, lambda: barriers.copy(target, source, own, full))
        return [*self.next(state, units), *oldest, free - taken, stages + 1]
