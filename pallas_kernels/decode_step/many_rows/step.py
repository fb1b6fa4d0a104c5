"""The phases of a step of many rows on one block, each a function, and their order.

Queries, keys and values, the parts of long texts and those of the down projection are words that
say which layer they belong to, as in a step of few rows. Inputs of products are 16-bit numbers,
which can't say so: all blocks meet before they are read.
"""

import dataclasses
from collections.abc import Callable

from pallas_kernels.decode_step.common import words as w
from pallas_kernels.decode_step.common.words import awaited, leave, over
from pallas_kernels.decode_step.few_rows.products import THREADS
from pallas_kernels.decode_step.few_rows.step import Share, gated
from pallas_kernels.decode_step.many_rows.exchange import MEETINGS, MOST_ROWS, SQUARES
from pallas_kernels.decode_step.many_rows.products import Finish, Products, Spots, Total
from pallas_kernels.decode_step.many_rows.texts import Texts
from pallas_kernels.decode_step.many_rows.warps import MET, SCALED, WITH_SCALERS
from pallas_kernels.decode_step.packed.plan import BAND, DOWN, GATE_UP, HEAD, OUTPUT, QKV
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import times
from pallas_kernels.decode_step.ptx.thread import V


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Share):
    """One block's part of a step of many rows.

    Attributes:
        attention: of the block's first row and key/value head.
        scales: shared memory for what each text's product is multiplied with after a norm, then for
            what its next hidden state is multiplied with to be an input.
    """

    texts: Texts
    products: Products
    scales: V

    @property
    def rows(self) -> int:
        return self.texts.rows

    def put(self, section: int, text: V, column: V, values: list[V]) -> None:
        """Leaves numbers of a product's input."""
        self.texts.put(self.layout.at(self.memory, section), text, column, values)

    def _meet(self, meetings: V, norm: bool = False) -> None:
        """Waits until all blocks have come to their meeting of this number, from 1.

        `norm` tells the warps that make scales.
        """
        counter = self.layout.at(self.memory, MEETINGS)
        barriers.before_copies()
        t.together(THREADS)

        def wait() -> None:
            barriers.count_arrival(counter)
            barriers.await_count(counter, meetings * self.plan.blocks)

        t.when(t.me().equals(0), wait)
        t.together(THREADS)
        if norm:
            t.arrive(WITH_SCALERS, MET)

    def _product(
        self, spots: Spots, phase: int, finish: Finish, norm: bool = False, height: int = BAND
    ) -> Spots:
        """A phase's product, after a norm or not."""
        p = self.plan.phases[phase]
        tiles = self.work.tiles(p)

        def scaled() -> None:
            if norm:
                t.together(WITH_SCALERS, SCALED)

        bands = self.work.count[phase]
        return self.products.product(spots, p, bands, tiles, finish, scaled, height)

    def _scale(self, text: V) -> V:
        return t.load_shared_floats(self.scales + text * 4)[0]

    def _own(self, item: V) -> tuple[V, V, V]:
        """Of four numbers of the block's hidden state: their place, text and first row."""
        rest = item // (BAND // 4)
        band = self.work.first[OUTPUT] + rest // self.rows
        return self.own + item * 16, rest % self.rows, band * BAND + item % (BAND // 4) * 4

    def _over_own(self, body: Callable[[V], None]) -> None:
        over(self.work.count[OUTPUT] * (self.rows * BAND // 4), THREADS, body)

    def _leave_hidden(self, norm: V, scaled: bool = True) -> None:
        """The block's hidden state as an input, with a norm's weights, and its squares.

        The norm's scale isn't known before all squares are. Numbers are multiplied with the scale
        of the norm before, lest float16 overflow; their products take the rest of it. Embeddings,
        which have no norm before them, enter as they are.
        """
        weights = self.norms + norm.wide() * (4 * self.plan.shape.hidden)
        t.together(THREADS)

        def four(item: V) -> None:
            place, text, row = self._own(item)
            weight = t.load_global(weights + (row << 2).wide(), 4)
            values = t.load_shared_floats(place, 4)
            values = [v * x.bits() for v, x in zip(values, weight, strict=True)]
            if scaled:
                (scale,) = t.load_shared_floats(self.scales + (text + MOST_ROWS) * 4)
                values = [v * scale for v in values]
            self.put(w.HIDDEN, text, row, values)

        def squares(item: V) -> None:
            """Of a band of a text."""
            at = self.own + item * (BAND * 4)
            values = [v for n in range(0, BAND, 4) for v in t.load_shared_floats(at + 4 * n, 4)]
            total = sum((v * v for v in values[1:]), start=values[0] * values[0])
            band = self.work.first[OUTPUT] + item // self.rows
            index = band * MOST_ROWS + item % self.rows
            t.store_global(self.layout.at(self.memory, SQUARES, index), [total])

        self._over_own(four)
        over(self.work.count[OUTPUT] * self.rows, THREADS, squares)

    def begin(self) -> None:
        """Takes the embeddings of this block's bands."""
        d = self.plan.shape.hidden

        def take(item: V) -> None:
            place, text, row = self._own(item)
            t.store_shared(place, t.load_global(self.hidden + ((text * d + row) << 2).wide(), 4))

        self._over_own(take)
        self._leave_hidden(t.integer(0), scaled=False)
        barriers.before_copies()

    def qkv(self, spots: Spots, layer: V, tag: V) -> Spots:
        """Queries, keys and values, biases added."""
        width = self.plan.shape.qkv

        def finish(band: V, text: V, row: V, total: Total) -> None:
            at = (self.work.first[QKV] + band) * BAND + row
            bias = t.load_global(self.bias + ((layer * width + at) << 2).wide(), 4)
            scale = self._scale(text)
            values = [x * scale + b.bits() for x, b in zip(total(0), bias, strict=True)]
            leave(self.word(w.QKV, width, text, at), values, tag)

        return self._product(spots, QKV, finish, norm=True)

    def attend(self, layer: V, tag: V) -> None:
        """Attention of every row and key/value head that is this block's turn."""
        blocks = self.plan.blocks
        units = self.rows * self.plan.shape.kv_heads * self.attention.splits

        def unit(i: V, _: list[V]) -> list[V]:
            mine = self.attention.block + i * blocks
            dataclasses.replace(self.attention, block=mine).attend(layer, tag)
            return []

        t.loop(-(-units // blocks), [], unit)

    def output(self, spots: Spots, layer: V) -> Spots:
        """Attention's result back into the hidden state."""

        def finish(band: V, text: V, row: V, total: Total) -> None:
            own = self.own + ((band * self.rows + text) * BAND + row) * 4
            before = t.load_shared_floats(own, 4)
            t.store_shared(own, [x + y for x, y in zip(before, total(0), strict=True)])

        spots = self._product(spots, OUTPUT, finish)
        self._leave_hidden(layer * 2 + 1)
        return spots

    def gate_up(self, spots: Spots) -> Spots:
        """silu(gate) * up; a band has eight rows of each."""
        height = BAND // 2

        def finish(band: V, text: V, row: V, total: Total) -> None:
            scale = self._scale(text)
            values = []
            for gate, up in zip(total(0), total(height), strict=True):
                gate, up = gate * scale, up * scale
                values.append(times(gated(gate, up), self.texts.format.scale))
            self.put(w.FFN, text, (self.work.first[GATE_UP] + band) * height + row, values)

        return self._product(spots, GATE_UP, finish, norm=True, height=height)

    def down(self, spots: Spots, tag: V) -> Spots:
        """The block's part of the down projection."""
        width = self.plan.shape.hidden

        def finish(band: V, text: V, row: V, total: Total) -> None:
            at = (self.work.first[DOWN] + band) * BAND + row
            text_of_part = self.work.part * self.rows + text
            values = [times(x, 1 / self.texts.format.scale) for x in total(0)]
            leave(self.word(w.PARTS, width, text_of_part, at), values, tag)

        return self._product(spots, DOWN, finish)

    def add_parts(self, layer: V, tag: V) -> None:
        """Adds the down projection's parts to the hidden state of this block's bands."""
        width, parts = self.plan.shape.hidden, self.plan.phases[DOWN].parts

        def of(item: V) -> list[V]:
            _, text, row = self._own(item)
            return [self.word(w.PARTS, width, text + n * self.rows, row) for n in range(parts)]

        def add(item: V) -> None:
            place, at = self.own + item * 16, of(item)
            values = t.load_shared_floats(place, 4)
            for part in awaited(at, 4, tag):
                values = [x + y for x, y in zip(values, part, strict=True)]
            t.store_shared(place, values)

        # One thread looks out for words of every part. If all of them did, in every block, they
        # would slow down what they wait for.
        first = t.me().equals(0) & (self.work.count[OUTPUT] > 0)
        t.when(first, lambda: awaited(of(t.integer(0)), 1, tag))
        t.together(THREADS)
        self._over_own(add)
        self._leave_hidden(layer * 2 + 2)

    def head(self, spots: Spots) -> None:
        """The logits."""
        vocab = self.plan.shape.vocab

        def finish(band: V, text: V, row: V, total: Total) -> None:
            at = text * vocab + (self.work.first[HEAD] + band) * BAND + row
            scale = self._scale(text)
            t.store_global(self.logits + (at << 2).wide(), [x * scale for x in total(0)])

        self._product(spots, HEAD, finish, norm=True)

    def run(self) -> None:
        """Every layer, then the head; blocks meet in front of all products but the first.

        Layers take turns with their tag; the first has 1.
        """
        # They have met before, where the words were cleared.
        t.arrive(WITH_SCALERS, MET)

        def layer(index: V, carry: list[V]) -> list[V]:
            spots, tag = Spots.carried(carry), (index + 1) & 1
            meetings = index * HEAD
            self.ended("begin")
            self.attention.prefetch(index)
            spots = self.qkv(spots, index, tag)
            self.ended("qkv")
            self.attend(index, tag)
            self.ended("attend")
            self.attention.combine(tag)
            self._meet(meetings + 1)
            self.ended("combine")
            spots = self.output(spots, index)
            self._meet(meetings + 2, norm=True)
            self.ended("output")
            spots = self.gate_up(spots)
            self._meet(meetings + 3)
            self.ended("gate_up")
            spots = self.down(spots, tag)
            self.ended("down")
            self.add_parts(index, tag)
            self._meet(meetings + 4, norm=True)
            self.ended("add_parts")
            return spots.carry()

        self.head(Spots.carried(t.loop(self.plan.shape.layers, Spots.begin().carry(), layer)))
        self.ended("head")
