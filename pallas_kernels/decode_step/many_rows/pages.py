"""Weights in the order in which many rows need them: some columns of all bands at hand, then more.

A page is 64 or 128 columns of each of a group of bands, so that pages differ in size. Half a tile
is copied by itself, since the bands lie one after the other on the tape, and takes any place in a
ring.
"""

import dataclasses
from typing import NamedTuple

from pallas_kernels.decode_step.common.ring import Place, Ring
from pallas_kernels.decode_step.few_rows.step import Work
from pallas_kernels.decode_step.few_rows.stream import TILE_BYTES
from pallas_kernels.decode_step.packed.packing import WARPS
from pallas_kernels.decode_step.packed.plan import HEAD, Phase, Plan
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V

MOST_BANDS = 24
"""Whose sums fit in the registers of eight warps: three to a warp."""
USUAL_BANDS = 16
"""Where several groups are needed."""
WHOLE_TILES = 10
"""Bands up to which a page holds whole tiles of them: a page should be a third of the ring."""
UNIT_BYTES = TILE_BYTES // 2
UNIT_PIECES = WARPS // 2
"""Half a tile: four times 16 columns."""


@dataclasses.dataclass(frozen=True)
class Group:
    """How a phase's bands are divided among the warps, some at a time.

    Attributes:
        bands: that are multiplied at the same time, at most.
        units: halves of a tile in a page.
        sharers: warps that share a band, each with some of its columns.
        each: bands of a warp.
    """

    bands: int
    units: int
    sharers: int
    each: int

    @classmethod
    def of(cls, phase: Phase) -> "Group":
        most = int(phase.count.max())
        turns = 1 if most <= MOST_BANDS else -(-most // USUAL_BANDS)
        bands = -(-most // turns)
        units = 2 if bands <= WHOLE_TILES else 1
        sharers = next(n for n in (8, 4, 2, 1) if n == 1 or bands <= WARPS // n)
        return cls(bands, units, sharers, -(-bands // (WARPS // sharers)))

    @property
    def pieces(self) -> int:
        """Times 16 columns in a page."""
        return UNIT_PIECES * self.units

    def pages(self, tiles: int | V) -> int | V:
        """Of a group of bands of so many tiles."""
        return tiles * (2 // self.units)

    def turns(self, bands: V) -> V:
        return (bands + (self.bands - 1)) // self.bands

    def at_hand(self, bands: V, turn: V) -> V:
        return t.smaller(bands - turn * self.bands, self.bands)


class Spot(NamedTuple):
    """Where a reader or the fetching warp stands: a page, and its first unit in the ring."""

    slot: V
    parity: V
    unit: V

    @classmethod
    def begin(cls) -> "Spot":
        return cls(*Place.begin(), t.integer(0))

    @property
    def place(self) -> Place:
        return Place(self.slot, self.parity)


class Pages:
    """The pages of one block.

    Attributes:
        units: address of a ring of `room` units in shared memory.
        ring: of pages: their barriers, and in its memory each page's number of units.
    """

    def __init__(self, units: V, room: int, ring: Ring):
        self.units, self.room, self.ring = units, room, ring

    def address(self, spot: Spot, unit: V) -> V:
        """Of a page's unit: all of its first band, then all of the next."""
        return self.units + self._wrapped(spot.unit + unit) * UNIT_BYTES

    def next(self, spot: Spot, units: V) -> Spot:
        return Spot(*self.ring.next(spot.place), self._wrapped(spot.unit + units))

    def _wrapped(self, unit: V) -> V:
        return t.select(unit >= self.room, unit - self.room, unit)

    def fetch(self, plan: Plan, tape: V, work: Work) -> None:
        """Fetches all pages of the block in order; for one warp, each lane a unit."""
        lane = t.me() % t.WARP

        def bands(phase: int, carry: list[V]) -> list[V]:
            p = plan.phases[phase]
            group, count = Group.of(p), work.count[phase]
            tiles = t.integer(work.tiles(p))
            band, unit = lane // group.units, lane % group.units

            def turn(i: V, carry: list[V]) -> list[V]:
                units = group.at_hand(count, i) * group.units
                first = (carry[0] + (i * group.bands + band) * tiles) * 2 + unit

                def page(i: V, state: list[V]) -> list[V]:
                    return self._fetch_page(tape, first + i * group.units, units, state)

                return [carry[0], *t.loop(group.pages(tiles), carry[1:], page)]

            carry = t.loop(group.turns(count), carry, turn)
            return [carry[0] + count * tiles, *carry[1:]]

        def layer(_: V, carry: list[V]) -> list[V]:
            for phase in range(HEAD):
                carry = bands(phase, carry)
            return carry

        none = [*Spot.begin(), *Place.begin(), t.integer(self.room), t.integer(0)]
        bands(HEAD, t.loop(plan.shape.layers, [work.tile, *none], layer))

    def _fetch_page(self, tape: V, unit: V, units: V, state: list[V]) -> list[V]:
        """One page, of which this lane's unit is that one of the tape.

        `state` is the page's spot, the oldest page's place, free units of the ring, and how many
        pages are in it.
        """
        ring, lane = self.ring, t.me() % t.WARP

        def crowded(oldest: list[V]) -> V:
            return (oldest[2] < units) | oldest[3].equals(ring.stages)

        def let_go(oldest: list[V]) -> list[V]:
            place = Place(*oldest[:2])
            barriers.await_turn(ring.empty(place.slot), place.parity)
            (size,) = t.load_shared(ring.memory + place.slot * ring.slot_bytes)
            return [*ring.next(place), oldest[2] + size, oldest[3] - 1]

        spot = Spot(*state[:3])
        *oldest, free, pages = t.loop_while(crowded, state[3:], let_go)
        full = ring.full(spot.slot)
        # A lane may not have read yet how many units the slot's last page had.
        t.warp_together()

        def announce() -> None:
            t.store_shared(ring.memory + spot.slot * ring.slot_bytes, [units])
            barriers.expect(full, units * UNIT_BYTES)

        t.when(lane.equals(0), announce)
        t.warp_together()
        source = tape + unit.wide() * UNIT_BYTES
        target = self.address(spot, lane)
        t.when(lane < units, lambda: barriers.copy(target, source, UNIT_BYTES, full))
        return [*self.next(spot, units), *oldest, free - units, pages + 1]
