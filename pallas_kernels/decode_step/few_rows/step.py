"""The phases of a decode step on one block, each a function, and their order."""

import dataclasses

from pallas_kernels.decode_step.common import words as w
from pallas_kernels.decode_step.common.attention import Attention
from pallas_kernels.decode_step.common.ring import Place
from pallas_kernels.decode_step.common.words import Layout, awaited, leave, over
from pallas_kernels.decode_step.few_rows.products import (
    THREADS,
    Finish,
    Prepare,
    Products,
    Total,
    nothing,
)
from pallas_kernels.decode_step.packed.plan import (
    BAND,
    COLUMNS,
    DOWN,
    GATE_UP,
    HEAD,
    OUTPUT,
    QKV,
    Phase,
    Plan,
)
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V

PHASES = ("begin", "qkv", "attend", "combine", "output", "gate_up", "down", "add_parts", "head")
"""What a trace tells the end of, in order: of the last layer, and of the head."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What the plan's table says of this block: its bands, and its part of the down projection."""

    tile: V
    first: list[V]
    count: list[V]
    part: V
    part_column: V
    part_tiles: V

    @classmethod
    def read(cls, table: V) -> "Work":
        """From the address of the block's row."""
        n = [v for at in range(0, 16, 4) for v in t.load_global(table + 4 * at, 4)]
        return cls(n[0], n[1:11:2], n[2:11:2], *n[11:14])

    def tiles(self, phase: Phase) -> int | V:
        """In each of the block's bands: of its part, where the columns are cut into parts."""
        return self.part_tiles if phase.parts > 1 else phase.across


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """One block's part of a step, of few rows or of many.

    Attributes:
        own: shared memory for the hidden state of the block's bands, `[bands, rows, 16]`.
        bias, norms, hidden: addresses of the inputs.
        logits: of the output.
        memory, layout: the words blocks leave for each other.
        times: of a trace, where there is one: int32 for every phase.
    """

    plan: Plan
    work: Work
    attention: Attention
    own: V
    bias: V
    norms: V
    hidden: V
    logits: V
    memory: V
    layout: Layout
    times: V | None

    def ended(self, phase: str) -> None:
        """Notes the time in a trace; a later layer overwrites an earlier one's."""
        if self.times is not None:
            at = self.times + 4 * PHASES.index(phase)
            t.when(t.me().equals(0), lambda: t.store_global(at, [t.nanoseconds()]))

    def word(self, section: int, width: int, text: V, at: V) -> V:
        """The address of a text's word in a section of `width` a text."""
        return self.layout.at(self.memory, section, text * width + at)


def gated(gate: V, up: V) -> V:
    """silu(gate) * up."""
    return gate * t.reciprocal(t.exp2(gate * -t.LOG2_E) + 1.0) * up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Share):
    """One block's part of a step of few rows."""

    rows: int
    products: Products

    def _scale(self, text: V) -> V:
        """What a norm multiplies by; it waits for the product's results."""
        shape = self.plan.shape
        mean = self.products.mean_square(text, shape.hidden)
        return t.rsqrt(mean + shape.eps)

    def _absorb(self, phase: int, section: int, width: int, tag: V, norm: V | None = None) -> None:
        """A phase's input, where this block has bands of it."""
        quads: int | V = self.plan.phases[phase].columns // 4
        most = self.plan.phases[phase].longest * COLUMNS // 4
        begin = self.layout.at(self.memory, section)
        if phase == DOWN:
            quads = self.work.part_tiles * (COLUMNS // 4)
            begin = begin + (self.work.part_column * (4 * COLUMNS)).wide()
        weights = None
        if norm is not None:
            weights = self.norms + norm.wide() * (4 * self.plan.shape.hidden)
        t.when(
            self.work.count[phase] > 0,
            lambda: self.products.absorb(begin, width, quads, most, tag, weights),
        )

    def _product(
        self,
        place: Place,
        phase: int,
        finish: Finish,
        prepare: Prepare = nothing,
        height: int = BAND,
    ) -> Place:
        p, bands = self.plan.phases[phase], self.work.count[phase]
        tiles = self.work.tiles(p)
        return self.products.product(place, p, bands, tiles, finish, prepare, height)

    def begin(self) -> None:
        """Takes the embeddings of this block's bands."""
        d = self.plan.shape.hidden

        def take(item: V) -> None:
            at, text, row = self._own(item)
            word = t.load_global(self.hidden + ((text * d + row) << 2).wide())
            t.store_shared(at, word)

        over(self.work.count[OUTPUT] * (self.rows * BAND), THREADS, take)

    def _own(self, item: V) -> tuple[V, V, V]:
        """Of a number of the block's hidden state: its place, text and row."""
        rest = item // BAND
        band = self.work.first[OUTPUT] + rest // self.rows
        return self.own + item * 4, rest % self.rows, band * BAND + item % BAND

    def qkv(self, place: Place, layer: V, tag: V, before: V) -> Place:
        """Queries, keys and values of the hidden state that `before` tags, biases added."""
        width = self.plan.shape.qkv
        self._absorb(QKV, w.HIDDEN, self.plan.shape.hidden, before, layer * 2)

        def bias(band: V, row: V, there: V) -> list[V]:
            at = layer * width + (self.work.first[QKV] + band) * BAND + row
            return t.load_global(self.bias + (at << 2).wide(), where=there)

        def finish(band: V, text: V, row: V, total: Total, bias: list[V]) -> None:
            at = (self.work.first[QKV] + band) * BAND + row
            value = total(row) * self._scale(text) + bias[0].bits()
            leave(self.word(w.QKV, width, text, at), [value], tag)

        return self._product(place, QKV, finish, bias)

    def output(self, place: Place, tag: V) -> Place:
        """Attention's result back into the hidden state."""
        shape = self.plan.shape
        self._absorb(OUTPUT, w.ATTENDED, shape.heads * shape.head_dim, tag)

        def finish(band: V, text: V, row: V, total: Total, _: list[V]) -> None:
            own = self.own + ((band * self.rows + text) * BAND + row) * 4
            value = t.load_shared_floats(own)[0] + total(row)
            t.store_shared(own, [value])
            at = (self.work.first[OUTPUT] + band) * BAND + row
            leave(self.word(w.MIDDLE, shape.hidden, text, at), [value], tag)

        return self._product(place, OUTPUT, finish)

    def gate_up(self, place: Place, layer: V, tag: V) -> Place:
        """silu(gate) * up; a band has eight rows of each."""
        self._absorb(GATE_UP, w.MIDDLE, self.plan.shape.hidden, tag, layer * 2 + 1)
        height = BAND // 2

        def finish(band: V, text: V, row: V, total: Total, _: list[V]) -> None:
            scale = self._scale(text)
            gate, up = total(row) * scale, total(row + height) * scale
            value = gated(gate, up)
            at = (self.work.first[GATE_UP] + band) * height + row
            leave(self.word(w.FFN, self.plan.shape.ffn, text, at), [value], tag)

        return self._product(place, GATE_UP, finish, height=height)

    def down(self, place: Place, tag: V) -> Place:
        """The block's part of the down projection."""
        shape = self.plan.shape
        self._absorb(DOWN, w.FFN, shape.ffn, tag)

        def finish(band: V, text: V, row: V, total: Total, _: list[V]) -> None:
            at = (self.work.first[DOWN] + band) * BAND + row
            text_of_part = self.work.part * self.rows + text
            leave(self.word(w.PARTS, shape.hidden, text_of_part, at), [total(row)], tag)

        return self._product(place, DOWN, finish)

    def add_parts(self, tag: V) -> None:
        """Adds the down projection's parts to the hidden state of this block's bands."""
        shape, parts = self.plan.shape, self.plan.phases[DOWN].parts

        def add(item: V) -> None:
            place, text, row = self._own(item)
            at = [
                self.word(w.PARTS, shape.hidden, text + part * self.rows, row)
                for part in range(parts)
            ]
            value = t.load_shared_floats(place)[0]
            for (part,) in awaited(at, 1, tag):
                value = value + part
            t.store_shared(place, [value])
            leave(self.word(w.HIDDEN, shape.hidden, text, row), [value], tag)

        def every() -> None:
            # Another thread wrote these numbers.
            t.together(THREADS)
            over(self.work.count[OUTPUT] * (self.rows * BAND), THREADS, add)

        t.when(self.work.count[OUTPUT] > 0, every)

    def head(self, place: Place, tag: V) -> None:
        """The logits."""
        shape = self.plan.shape
        self._absorb(HEAD, w.HIDDEN, shape.hidden, tag, t.integer(2 * shape.layers))

        def finish(band: V, text: V, row: V, total: Total, _: list[V]) -> None:
            at = text * shape.vocab + (self.work.first[HEAD] + band) * BAND + row
            value = total(row) * self._scale(text)
            t.store_global(self.logits + (at << 2).wide(), [value])

        self._product(place, HEAD, finish)

    def run(self) -> None:
        """Every layer, then the head. Layers take turns with their tag; the first has 1."""
        layers = self.plan.shape.layers

        def layer(index: V, carry: list[V]) -> list[V]:
            place, tag, before = Place(*carry), (index + 1) & 1, index & 1
            self.ended("begin")
            self.attention.prefetch(index)
            place = self.qkv(place, index, tag, before)
            self.ended("qkv")
            self.attention.attend(index, tag)
            self.ended("attend")
            self.attention.combine(tag)
            self.ended("combine")
            place = self.output(place, tag)
            self.ended("output")
            place = self.gate_up(place, index, tag)
            self.ended("gate_up")
            place = self.down(place, tag)
            self.ended("down")
            self.add_parts(tag)
            self.ended("add_parts")
            return [*place]

        place = Place(*t.loop(layers, [*Place.begin()], layer))
        self.head(place, t.integer(layers & 1))
        self.ended("head")
