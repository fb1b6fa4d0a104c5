"""Weights in the order in which many rows need them: of all bands at hand 128 columns, then more.

Each tile is copied by itself, since the bands lie one after the other on the tape. A page is a
tile of each of a group of bands, so that pages differ in size; they take up a ring of tiles.
"""

import dataclasses
from typing import NamedTuple

from pallas_kernels.decode_step import barriers
from pallas_kernels.decode_step import thread as t
from pallas_kernels.decode_step.packing import WARPS
from pallas_kernels.decode_step.plan import HEAD, Phase, Plan
from pallas_kernels.decode_step.ring import Place, Ring
from pallas_kernels.decode_step.step import Work
from pallas_kernels.decode_step.stream import TILE_BYTES
from pallas_kernels.decode_step.thread import V

MOST_BANDS = 24
"""Whose sums fit in the registers of eight warps: three to a warp."""
USUAL_BANDS = 16
"""Where several groups are needed."""


@dataclasses.dataclass(frozen=True)
class Group:
    """How a phase's bands are divided among the warps, some at a time.

    Attributes:
        bands: that are multiplied at the same time, at most.
        sharers: warps that share a band, each with some of its columns.
        each: bands of a warp.
    """

    bands: int
    sharers: int
    each: int

    @classmethod
    def of(cls, phase: Phase) -> "Group":
        most = int(phase.count.max())
        turns = 1 if most <= MOST_BANDS else -(-most // USUAL_BANDS)
        bands = -(-most // turns)
        sharers = next(n for n in (8, 4, 2, 1) if n == 1 or bands <= WARPS // n)
        return cls(bands, sharers, -(-bands // (WARPS // sharers)))

    def turns(self, bands: V) -> V:
        return (bands + (self.bands - 1)) // self.bands

    def at_hand(self, bands: V, turn: V) -> V:
        return t.smaller(bands - turn * self.bands, self.bands)


class Spot(NamedTuple):
    """Where a reader or the fetching warp stands: a page, and its first tile in the ring."""

    slot: V
    parity: V
    tile: V

    @classmethod
    def begin(cls) -> "Spot":
        return cls(*Place.begin(), t.integer(0))

    @property
    def place(self) -> Place:
        return Place(self.slot, self.parity)


class Pages:
    """The pages of one block.

    Attributes:
        tiles: address of a ring of `room` tiles in shared memory.
        ring: of pages: their barriers, and in its memory each page's number of tiles.
    """

    def __init__(self, tiles: V, room: int, ring: Ring):
        self.tiles, self.room, self.ring = tiles, room, ring

    def address(self, spot: Spot, band: V) -> V:
        """Of a page's tile of a band."""
        return self.tiles + self._wrapped(spot.tile + band) * TILE_BYTES

    def next(self, spot: Spot, bands: V) -> Spot:
        return Spot(*self.ring.next(spot.place), self._wrapped(spot.tile + bands))

    def _wrapped(self, tile: V) -> V:
        return t.select(tile >= self.room, tile - self.room, tile)

    def fetch(self, plan: Plan, tape: V, work: Work) -> None:
        """Fetches all pages of the block in order; for one warp, each lane a band."""
        lane = t.me() % t.WARP

        def bands(phase: int, carry: list[V]) -> list[V]:
            p = plan.phases[phase]
            group, count = Group.of(p), work.count[phase]
            tiles = work.part_tiles if p.parts > 1 else t.integer(p.across)

            def turn(i: V, carry: list[V]) -> list[V]:
                at_hand = group.at_hand(count, i)
                first = carry[0] + (i * group.bands + lane) * tiles

                def page(column: V, state: list[V]) -> list[V]:
                    return self._fetch_page(tape, first + column, at_hand, state)

                return [carry[0], *t.loop(tiles, carry[1:], page)]

            carry = t.loop(group.turns(count), carry, turn)
            return [carry[0] + count * tiles, *carry[1:]]

        def layer(_: V, carry: list[V]) -> list[V]:
            for phase in range(HEAD):
                carry = bands(phase, carry)
            return carry

        none = [*Spot.begin(), *Place.begin(), t.integer(self.room), t.integer(0)]
        bands(HEAD, t.loop(plan.shape.layers, [work.tile, *none], layer))

    def _fetch_page(self, tape: V, tile: V, bands: V, state: list[V]) -> list[V]:
        """One page, of which this lane's tile is at `tile` on the tape.

        `state` is the page's spot, the oldest page's place, free tiles of the ring, and how many
        pages are in it.
        """
        ring, lane = self.ring, t.me() % t.WARP

        def crowded(oldest: list[V]) -> V:
            return (oldest[2] < bands) | oldest[3].equals(ring.stages)

        def let_go(oldest: list[V]) -> list[V]:
            place = Place(*oldest[:2])
            barriers.await_turn(ring.empty(place.slot), place.parity)
            (size,) = t.load_shared(ring.memory + place.slot * ring.slot_bytes)
            return [*ring.next(place), oldest[2] + size, oldest[3] - 1]

        spot = Spot(*state[:3])
        *oldest, free, pages = t.loop_while(crowded, state[3:], let_go)
        full = ring.full(spot.slot)

        def announce() -> None:
            t.store_shared(ring.memory + spot.slot * ring.slot_bytes, [bands])
            barriers.expect(full, bands * TILE_BYTES)

        t.when(lane.equals(0), announce)
        t.warp_together()
        source = tape + tile.wide() * TILE_BYTES
        target = self.address(spot, lane)
        t.when(lane < bands, lambda: barriers.copy(target, source, TILE_BYTES, full))
        return [*self.next(spot, bands), *oldest, free - bands, pages + 1]
