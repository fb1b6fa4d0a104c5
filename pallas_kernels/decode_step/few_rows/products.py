"""A matrix product of a phase: its input into shared memory, then band after band.

The warps of a block share each band: of every 128 columns a warp has 16. Weights are the first
operand of the tensor-core product, eight texts at a time the second. An input is float32; it
enters as two 16-bit numbers, rounded and the rest.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

from pallas_kernels.decode_step.common.ring import Place
from pallas_kernels.decode_step.common.words import awaited
from pallas_kernels.decode_step.few_rows.stream import PIECE_BYTES, TILE_BYTES, Stream
from pallas_kernels.decode_step.packed.packing import WARPS
from pallas_kernels.decode_step.packed.plan import BAND, Phase
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import Format, times
from pallas_kernels.decode_step.ptx.thread import V

THREADS = WARPS * t.WARP
QUAD = 4
"""Numbers of an input that a lane takes at once: its operand of one product."""
AT_ONCE = 8
"""Quads that a lane waits for together."""
TEXTS = 8
"""Texts that a tensor-core product takes at most: it has eight columns."""
SUMS = 16
"""A lane's running sums: four for each of four products that needn't wait for each other."""

MOST_KEPT = 8
"""Tiles up to which an input is kept in registers for all bands."""


def input_bytes(tiles: int, rows: int) -> int:
    """Shared memory for an input of so many tiles' columns."""
    return tiles * WARPS * rows * 64


def sums_bytes(bands: int, rows: int) -> int:
    """Shared memory for the warps' sums of so many bands, twice."""
    return 2 * bands * WARPS * rows * BAND * 4


Prepare = Callable[[V, V, V], list[V]]
Total = Callable[[V], V]
Finish = Callable[[V, V, V, Total, list[V]], None]


def nothing(band: V, row: V, there: V) -> list[V]:
    """What most phases prepare."""
    return []


class Products:
    """What the products of a block share.

    Attributes:
        rows: texts, 1 to 16.
        stream: the block's weights.
        inputs: shared memory for the input, as operands: of every 16 columns each text's four
            quads, four rounded numbers and their four rests.
        sums: shared memory for the warps' sums, twice.
        most_bands: bands whose sums are added up together.
        squares: shared memory for the warps' sums of squares.
        format: of the weights.
    """

    def __init__(
        self,
        rows: int,
        stream: Stream,
        inputs: V,
        sums: V,
        squares: V,
        most_bands: int,
        format: Format,
    ):
        self.rows, self.stream, self.most_bands, self.format = rows, stream, most_bands, format
        self.inputs, self.sums, self.squares = inputs, sums, squares
        self.warps_each = max(1, WARPS // rows)
        # A text's rounded numbers and their rests are two of a product's columns, or one of two
        # products.
        self.narrow = rows <= 4
        self.eights = -(-rows // TEXTS)

    def absorb(
        self,
        source: V,
        stride: int,
        quads: int | V,
        most_quads: int,
        tag: V,
        norm: V | None = None,
    ) -> None:
        """Waits for an input and puts it into shared memory.

        Args:
            source: address of the first text's words.
            stride: words from a text to the next.
            quads: a quarter of the input's length, `most_quads` of them on any block.
            tag: of the words.
            norm: address of weights to multiply with; the sum of squares of what they are
                multiplied with is kept as well.
        """
        warp, lane = t.me() // t.WARP, t.me() % t.WARP
        turn = warp % self.warps_each
        stripe = t.WARP * self.warps_each
        at_once = min(AT_ONCE, -(-most_quads // stripe))

        def some(text: V, i: V, squares: list[V]) -> list[V]:
            first = (i * at_once * self.warps_each + turn) * t.WARP + lane
            wanted = [first + n * stripe for n in range(at_once)]
            there = [q < quads for q in wanted]
            begin = source + (text * (4 * stride)).wide()
            weights = []
            if norm:
                weights = [
                    t.load_global(norm + (q << 4).wide(), 4, where=inside)
                    for q, inside in zip(wanted, there, strict=True)
                ]
            words = awaited([begin + (q << 4).wide() for q in wanted], 4, tag, there)
            (total,) = squares
            for n, (q, values) in enumerate(zip(wanted, words, strict=True)):
                if norm:
                    total = sum((v * v for v in values), start=total)
                    values = [v * w.bits() for v, w in zip(values, weights[n], strict=True)]
                pairs = [self.format.split(*values[:2]), self.format.split(*values[2:])]
                operand = [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]]
                at = (q // QUAD) * (64 * self.rows) + text * 64 + (q % QUAD) * 16
                place = self.inputs + at
                t.when(there[n], functools.partial(t.store_shared, place, operand))
            return [total]

        def all_of(text: V) -> None:
            turns = (t.integer(quads) + (stripe * at_once - 1)) // (stripe * at_once)
            (squares,) = t.loop(turns, [t.number(0)], functools.partial(some, text))
            if norm:
                total = t.warp_sum(squares)
                at = self.squares + (text * self.warps_each + turn) * 4
                t.when(lane.equals(0), lambda: t.store_shared(at, [total]))

        def every(i: V, _: list[V]) -> list[V]:
            text = i * WARPS + warp // self.warps_each
            t.when(text < self.rows, lambda: all_of(text))
            return []

        # One thread looks out for the first word. If all of them did, in every block, they would
        # slow down what they wait for.
        t.when(t.me().equals(0), lambda: awaited([source], 1, tag))
        t.together(THREADS)
        t.loop(-(-self.rows // WARPS), [], every)
        t.together(THREADS)

    def mean_square(self, text: V, length: int) -> V:
        """Of the input absorbed with weights."""
        at = self.squares + text * (4 * self.warps_each)
        each = [t.load_shared_floats(at + 4 * i)[0] for i in range(self.warps_each)]
        return sum(each[1:], start=each[0]) * (1 / length)

    def product(
        self,
        place: Place,
        phase: Phase,
        bands: V,
        tiles: int | V,
        finish: Finish,
        prepare: Prepare = nothing,
        height: int = BAND,
    ) -> Place:
        """Multiplies a block's bands with the input.

        A thread has one number of each group of bands: the block's `band`, and its `row` of
        `height`, of one text.

        Args:
            finish: called with band, text, row, the sum of any row of the band, and what was
                prepared.
            prepare: loads for `finish`, with band and row and whether they are there, before
                the bands are multiplied.
        """

        def mine() -> tuple[V, V, V]:
            """Band of a group, text and row; worked out anew rather than kept while bands run."""
            row, rest = t.me() % height, t.me() // height
            return rest // self.rows, rest % self.rows, row

        def group(i: V, carry: list[V]) -> list[V]:
            first = i * self.most_bands
            count = t.smaller(bands - first, self.most_bands)
            sums = self.sums + (i & 1) * (sums_bytes(self.most_bands, self.rows) // 2)
            number, _, row = mine()
            ready = prepare(first + number, row, number < count)

            def band(n: V, carry: list[V]) -> list[V]:
                at = Place(*carry)
                if kept:
                    return [*self._short_band(at, phase, n, sums, kept)]
                return [*self._band(at, phase, tiles, n, sums)]

            carry = t.loop(count, carry, band)
            t.together(THREADS)
            number, text, row = mine()
            total = functools.partial(self._total, sums, number, text)
            t.when(number < count, lambda: finish(first + number, text, row, total, ready))
            return carry

        kept = []
        if isinstance(tiles, int) and tiles <= MOST_KEPT:
            kept = [self._input(t.integer(n)) for n in range(tiles)]
        groups = (bands + (self.most_bands - 1)) // self.most_bands
        return Place(*t.loop(groups, [*place], group))

    def _input(self, tile: V, there: V | None = None) -> list[V]:
        """This lane's operands of a tile: one product's, or two for every eight texts."""
        lane, warp = t.me() % t.WARP, t.me() // t.WARP
        column, quarter = lane // 4, lane % 4
        at = self.inputs + (tile * WARPS + warp) * (64 * self.rows)
        if self.narrow:
            words, texts = 2, column // 2
            own = column // 2 * 64 + quarter * 16 + column % 2 * 8
        else:
            words, texts = 4, column
            own = lane * 16
        loaded = []
        for first in range(0, self.rows, TEXTS):
            used = texts < self.rows - first
            used = used if there is None else used & there
            loaded += t.load_shared(at + own + first * 64, words, used)
        return loaded

    def _weights(self, place: Place, count: int, there: Sequence[V | None]) -> list[list[V]]:
        """This lane's operands of a page's tiles, once the page has come."""
        lane, warp = t.me() % t.WARP, t.me() // t.WARP
        at = self.stream.wait(place) + warp * PIECE_BYTES + lane * 16
        return [t.load_shared(at + n * TILE_BYTES, 4, there[n]) for n in range(count)]

    def _multiplied(
        self, totals: Sequence[V], weights: list[list[V]], inputs: list[list[V]]
    ) -> list[V]:
        """Running sums with some tiles added; of every eight texts in turn, a share of them."""
        totals, each = list(totals), SUMS // self.eights
        turns = [itertools.cycle(range(i, i + each, 4)) for i in range(0, SUMS, each)]
        for w, x in zip(weights, inputs, strict=True):
            # The memory has a lane's row first, the instruction its column.
            a = [w[0], w[2], w[1], w[3]]
            for half in range(0, len(x), 2):
                at = next(turns[half // 4])
                totals[at : at + 4] = self.format.multiply(
                    a, x[half : half + 2], totals[at : at + 4]
                )
        return totals

    def _band(self, place: Place, phase: Phase, tiles: int | V, number: V, sums: V) -> Place:
        """Multiplies one band with the input, page by page."""
        even = isinstance(tiles, int) and tiles % phase.pages == 0

        def page(i: V, carry: list[V]) -> list[V]:
            place, totals = Place(*carry[:2]), carry[2:]
            begin, end = ((tiles * (i + n)) // phase.pages for n in (0, 1))
            count = phase.page_tiles
            there = [None if even or n + 1 < count else begin + n < end for n in range(count)]
            weights = self._weights(place, count, there)
            inputs = [self._input(begin + n, c) for n, c in enumerate(there)]
            totals = self._multiplied(totals, weights, inputs)
            self.stream.release(place)
            return [*self.stream.next(place), *totals]

        carry = [*place, *[t.number(0)] * SUMS]
        slot, parity, *totals = t.loop(phase.pages, carry, page)
        self._store(totals, number, sums)
        return Place(slot, parity)

    def _short_band(
        self, place: Place, phase: Phase, number: V, sums: V, inputs: list[list[V]]
    ) -> Place:
        """The same with an input in registers, all pages at once."""
        tiles, weights = len(inputs), []
        for i in range(phase.pages):
            count = tiles * (i + 1) // phase.pages - tiles * i // phase.pages
            weights += self._weights(place, count, [None] * count)
            self.stream.release(place)
            place = self.stream.next(place)
        self._store(self._multiplied([t.number(0)] * SUMS, weights, inputs), number, sums)
        return place

    def _store(self, totals: Sequence[V], number: V, sums: V) -> None:
        """Leaves this warp's sums of a band for `_total`."""
        lane, warp = t.me() % t.WARP, t.me() // t.WARP
        row, quarter = lane // 4, lane % 4
        each, rest = SUMS // self.eights, 1 / self.format.rest
        if not self.narrow:
            # Of an eight's products every second was one of rests.
            totals = [times(x, rest if i // 4 % 2 else 1) for i, x in enumerate(totals)]
        found = [
            [sum(totals[n + i + 4 : n + each : 4], start=totals[n + i]) for i in range(4)]
            for n in range(0, SUMS, each)
        ]
        base = sums + (number * WARPS + warp) * (self.rows * BAND * 4)

        def store(text: V, low: V, high: V) -> None:
            """The text's sums of the band's rows g and g + 8."""
            at = base + (text * BAND + row) * 4

            def both() -> None:
                t.store_shared(at, [low])
                t.store_shared(at + 32, [high])

            t.when(text < self.rows, both)

        if self.narrow:
            ((a, b, c, d),) = found
            store(quarter, a + times(b, rest), c + times(d, rest))
            return
        for first, (a, b, c, d) in zip(range(0, self.rows, TEXTS), found, strict=True):
            store(quarter * 2 + first, a, c)
            store(quarter * 2 + (first + 1), b, d)

    def _total(self, sums: V, band: V, text: V, row: V) -> V:
        """One number of a band: the sum over the warps."""
        at = sums + ((band * (WARPS * self.rows) + text) * BAND + row) * 4
        parts = [t.load_shared_floats(at + w * (self.rows * BAND * 4))[0] for w in range(WARPS)]
        return times(sum(parts[1:], start=parts[0]), 1 / self.format.scale)
