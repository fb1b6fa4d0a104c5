"""A matrix product of many rows: bands side by side, some columns of all of them at a time.

An input of so many texts doesn't fit in shared memory, so it streams through it as the weights
do: once for all bands of a block, as far as registers have room for their sums. The warps divide
the bands; where there are few, several warps share one and each takes some of the columns.
"""

from collections.abc import Callable
from typing import NamedTuple

from pallas_kernels.decode_step.common.ring import Place, Ring
from pallas_kernels.decode_step.common.words import over
from pallas_kernels.decode_step.few_rows.products import THREADS
from pallas_kernels.decode_step.few_rows.stream import PIECE_BYTES
from pallas_kernels.decode_step.many_rows.pages import UNIT_PIECES, Group, Pages, Spot
from pallas_kernels.decode_step.many_rows.texts import PAIR_BYTES, Texts
from pallas_kernels.decode_step.packed.packing import WARPS
from pallas_kernels.decode_step.packed.plan import BAND, Phase
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V

STRIDE = BAND + 4
"""Words from a text's sums to the next's, so that lanes store into different banks."""
AT_ONCE = 2
"""Times 16 columns whose operands are loaded while as many are multiplied."""


def sums_bytes(texts: Texts) -> int:
    """Shared memory for the sums of a band of each warp."""
    return WARPS * texts.padded * STRIDE * 4


Total = Callable[[int], list[V]]
Finish = Callable[[V, V, V, Total], None]


class Spots(NamedTuple):
    """Where a block stands in its two streams."""

    page: Spot
    chunk: Place

    @classmethod
    def begin(cls) -> "Spots":
        return cls(Spot.begin(), Place.begin())

    def carry(self) -> list[V]:
        return [*self.page, *self.chunk]

    @classmethod
    def carried(cls, carry: list[V]) -> "Spots":
        return cls(Spot(*carry[:3]), Place(*carry[3:]))


class Products:
    """What the products of a block share.

    Attributes:
        texts: the layout of inputs.
        pages: the block's weights.
        chunks: those of the input.
        sums: shared memory for the sums of a band of each warp.
    """

    def __init__(self, texts: Texts, pages: Pages, chunks: Ring, sums: V):
        self.texts, self.pages, self.chunks, self.sums = texts, pages, chunks, sums

    def product(
        self,
        spots: Spots,
        phase: Phase,
        bands: V,
        tiles: int | V,
        finish: Finish,
        ready: Callable[[], None],
        height: int,
    ) -> Spots:
        """Multiplies a block's bands with the input.

        Args:
            tiles: in a band.
            finish: called with the block's band, a text, a row that is a multiple of four and
                below `height`, and a function from 0 or 8 to the sums of four rows: from that row
                on, or from so many after it.
            ready: waits for what `finish` needs besides; called once, without bands too.
        """
        group = Group.of(phase)
        size = group.each * self.texts.padded // 2  # of a lane's sums

        def turn(i: V, carry: list[V]) -> list[V]:
            at_hand = group.at_hand(bands, i)
            busy = t.me() // t.WARP // group.sharers < at_hand

            def page(_: V, carry: list[V]) -> list[V]:
                spots, sums = Spots.carried(carry[:5]), carry[5:]
                self.pages.ring.wait(spots.page.place)
                chunk = self.chunks.wait(spots.chunk)

                def multiplied() -> list[V]:
                    return self._multiplied(group, spots.page, chunk, sums)

                sums = multiplied() if group.each > 1 else t.either(busy, multiplied, sums)
                self.pages.ring.release(spots.page.place)
                self.chunks.release(spots.chunk)
                following = self.pages.next(spots.page, at_hand * group.units)
                return [*following, *self.chunks.next(spots.chunk), *sums]

            carry = t.loop(group.pages(tiles), [*carry, *[t.number(0)] * size], page)
            first, sums = i * group.bands, carry[5:]
            t.when(i.equals(0), ready)
            for n in range(group.each):
                each = size // group.each
                self._store(sums[n * each : (n + 1) * each])
                t.together(THREADS)
                self._finish(group, n, first, at_hand, finish, height)
                t.together(THREADS)
            return carry[:5]

        after = t.loop(group.turns(bands), spots.carry(), turn)
        t.when(bands.equals(0), ready)
        return Spots.carried(after)

    def _multiplied(self, group: Group, page: Spot, chunk: V, sums: list[V]) -> list[V]:
        """A lane's sums with a page added: of its bands in turn, of every eight texts."""
        lane, warp = t.me() % t.WARP, t.me() // t.WARP
        of, share = warp // group.sharers, warp % group.sharers
        inputs = chunk + share * self.texts.piece_bytes + lane * 16
        own = share % UNIT_PIECES * PIECE_BYTES + lane * 16
        bands = [of + n * (WARPS // group.sharers) for n in range(group.each)]
        weights = [
            [self.pages.address(page, band * group.units + unit) + own for band in bands]
            # Eight warps that share a band have no unit in common.
            for unit in ([share // UNIT_PIECES] if group.sharers == WARPS else range(group.units))
        ]
        pieces = range(0, group.pieces, group.sharers)
        at_once = min(AT_ONCE, len(pieces))

        def operands(piece: int) -> tuple[list[list[V]], list[list[V]]]:
            x = [
                t.load_shared(inputs + (piece * self.texts.piece_bytes + n * PAIR_BYTES), 4)
                for n in range(self.texts.pairs)
            ]
            offset = piece % UNIT_PIECES * PIECE_BYTES
            return x, [t.load_shared(at + offset, 4) for at in weights[piece // UNIT_PIECES]]

        turns = [pieces[n : n + at_once] for n in range(0, len(pieces), at_once)]
        later = [operands(piece) for piece in turns[0]]
        sums = list(sums)
        for following in [*turns[1:], ()]:
            loaded, later = later, [operands(piece) for piece in following]
            for x, ws in loaded:
                eights = [pair[half : half + 2] for pair in x for half in (0, 2)]
                for n, w in enumerate(ws):
                    # The memory has a lane's row first, the instruction its column.
                    a = [w[0], w[2], w[1], w[3]]
                    for eight, b in enumerate(eights):
                        at = (n * len(eights) + eight) * 4
                        sums[at : at + 4] = self.texts.format.multiply(a, b, sums[at : at + 4])
        return sums

    def _store(self, sums: list[V]) -> None:
        """Leaves this warp's sums of one band."""
        lane, warp = t.me() % t.WARP, t.me() // t.WARP
        row, text = lane // 4, lane % 4 * 2
        at = self.sums + ((warp * self.texts.padded + text) * STRIDE + row) * 4
        for eight in range(len(sums) // 4):
            for n, value in enumerate(sums[4 * eight : 4 * eight + 4]):
                # Rows g and g + 8 of texts 2 t and 2 t + 1.
                offset = (eight * 8 + n % 2) * STRIDE + n // 2 * 8
                t.store_shared(at + offset * 4, [value])

    def _finish(
        self, group: Group, n: int, first: V, at_hand: V, finish: Finish, height: int
    ) -> None:
        """Calls `finish` for the n-th band of every warp."""
        quads, across = height // 4, WARPS // group.sharers

        def item(number: V) -> None:
            row, rest = number % quads * 4, number // quads
            text, of = rest % self.texts.rows, rest // self.texts.rows
            band = of + n * across
            begin = (of * group.sharers * self.texts.padded + text) * STRIDE + row

            def total(below: int) -> list[V]:
                found: list[V] = []
                for sharer in range(group.sharers):
                    at = begin + (sharer * self.texts.padded * STRIDE + below)
                    part = t.load_shared_floats(self.sums + at * 4, 4)
                    found = [x + y for x, y in zip(found, part, strict=True)] if found else part
                return found

            t.when(band < at_hand, lambda: finish(first + band, text, row, total))

        over(min(across, group.bands) * self.texts.rows * quads, THREADS, item)
