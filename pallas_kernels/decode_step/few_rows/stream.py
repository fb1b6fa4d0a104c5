"""A block's stream of weights: one thread fetches pages of the tape ahead, eight warps read them.

The stream runs on across bands, phases and layers, through a ring of shared memory. So the
weights of the next phases arrive while the blocks wait for each other.
"""

from pallas_kernels.decode_step.common.ring import Place, Ring
from pallas_kernels.decode_step.packed.packing import PIECE, WARPS
from pallas_kernels.decode_step.packed.plan import HEAD, Plan
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V

PIECE_BYTES = 2 * PIECE
TILE_BYTES = WARPS * PIECE_BYTES
IN_FLIGHT = 3
"""Pages on their way at a time. More fill the memory's queues, and the words that blocks leave for
each other come late; fewer leave it idle."""


class Stream(Ring):
    """The pages of one block, page after page as they lie on the tape."""

    def fetch(self, plan: Plan, tape: V, first: V, count: list[V], part_tiles: V) -> None:
        """Fetches all pages of the block in order; for one thread alone.

        Args:
            tape: address of the tape.
            first: the block's first tile.
            count: its bands of each phase.
            part_tiles: tiles in a band of its part of the down projection.
        """

        def bands(phase: int, carry: list[V]) -> list[V]:
            p = plan.phases[phase]
            tiles = part_tiles if p.parts > 1 else t.integer(p.across)

            def band(_: V, carry: list[V]) -> list[V]:
                return t.loop(p.pages, carry, page)

            def page(i: V, carry: list[V]) -> list[V]:
                tile, number, *at = carry
                place, landed = Place(*at[:2]), Place(*at[2:])
                size = (tiles * (i + 1)) // p.pages - (tiles * i) // p.pages
                late = number >= IN_FLIGHT
                t.when(late, lambda: barriers.await_turn(self.full(landed.slot), landed.parity))
                after = self.next(landed)
                landed = Place(*(t.select(late, x, y) for x, y in zip(after, landed, strict=True)))
                # A slot that was never used is empty: the turn before the first is over.
                barriers.await_turn(self.empty(place.slot), place.parity ^ 1)
                barriers.copy_in(
                    self.memory + place.slot * self.slot_bytes,
                    tape + tile.wide() * TILE_BYTES,
                    size * TILE_BYTES,
                    self.full(place.slot),
                )
                return [tile + size, number + 1, *self.next(place), *landed]

            return t.loop(count[phase], carry, band)

        def layer(_: V, carry: list[V]) -> list[V]:
            for phase in range(HEAD):
                carry = bands(phase, carry)
            return carry

        bands(
            HEAD,
            t.loop(plan.shape.layers, [first, t.integer(0), *Place.begin(), *Place.begin()], layer),
        )
