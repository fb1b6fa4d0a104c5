"""The phases of a decode step on one block, their epilogues, and their order.

Both kernels have these. What they differ in is how the input of a product arrives, the product's
main loop, and when a norm's scale is known; `few_rows/step.py` and `many_rows/step.py` say how.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

from pallas_kernels.decode_step.common.attention import Attention
from pallas_kernels.decode_step.common.exchange import Exchange, Section, poll, publish
from pallas_kernels.decode_step.common.launch import THREADS, Arguments
from pallas_kernels.decode_step.common.record import Recorded
from pallas_kernels.decode_step.common.trace import Trace
from pallas_kernels.decode_step.common.work import Kinds, Work
from pallas_kernels.decode_step.packed.plan import DOWN, GATE_UP, HEAD, O_PROJ, QKV, StepPlan
from pallas_kernels.decode_step.packed.tile import M_TILE
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.loops import block_stride_loop
from pallas_kernels.decode_step.ptx.thread import V

NORMED = (QKV, GATE_UP, HEAD)
"""Phases whose input is the hidden state after a norm."""

Total = Callable[[int], list[V]]
"""A product's sums for some consecutive outputs, or for those so many further in the M-tile."""
Prepare = Callable[[V, V, V | None], list[V]]
"""What an epilogue loads, of an M-tile and its first output, if they are there."""
Epilogue = Callable[[V, V, V, Total, list[V]], None]
"""What becomes of sums: called with the block's M-tile, the row, the first of the consecutive
outputs, counted from the M-tile's first, their sums, and what was prepared."""


def nothing(m_tile: V, out: V, there: V | None) -> list[V]:
    """What most epilogues prepare."""
    return []


def own_bytes(plan: StepPlan, rows: int) -> int:
    """Shared memory for `Phases.own`."""
    return int(plan.phases[O_PROJ].count.max()) * rows * M_TILE * 4


def gated(gate: V, up: V) -> V:
    """silu(gate) * up."""
    return gate * t.reciprocal(t.exp2(gate * -t.LOG2_E) + 1.0) * up


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a phase knows of its layer.

    Attributes:
        index: from 0; of the head, how many layers there are.
        flag: of the numbers it publishes, the parity of its number counted from 1.
        before: flag of the hidden state that it begins with.
        kinds: how its phases are stored; of the head nothing.
    """

    index: V
    flag: V
    before: V
    kinds: Kinds = ()

    @classmethod
    def of(cls, index: V, kinds: Kinds = ()) -> "Layer":
        return cls(index, (index + 1) & 1, index & 1, kinds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases(abc.ABC):
    """One block's part of a step.

    Attributes:
        own: shared memory for the hidden state of the block's M-tiles, `[m_tiles, rows, 16]`.
        given: addresses of the kernel's inputs and outputs.
    """

    plan: StepPlan
    rows: int
    work: Work
    attention: Attention
    own: V
    given: Arguments
    exchange: Exchange
    trace: Trace

    consecutive: ClassVar[int]
    """Outputs that a thread finishes together."""

    @abc.abstractmethod
    def start(self) -> list[V]:
        """Where the block stands in its streams of weights and inputs before the first product."""

    @abc.abstractmethod
    def await_input(self, phase: int, layer: Layer) -> None:
        """Has the phase's input ready for its product."""

    @abc.abstractmethod
    def product(
        self,
        streams: list[V],
        phase: int,
        layer: Layer,
        epilogue: Epilogue,
        prepare: Prepare = nothing,
        height: int = M_TILE,
    ) -> list[V]:
        """Multiplies the block's M-tiles of a phase with its input.

        Every output below `height` of every M-tile and row is an epilogue's. Returns where the
        block stands in its streams then.
        """

    @abc.abstractmethod
    def scale(self, row: V) -> V:
        """What a norm multiplies a row with, in the epilogue of the product after it."""

    @abc.abstractmethod
    def publish_ffn_act(self, row: V, column: V, values: list[V], layer: Layer) -> None:
        """Publishes some of gate and up's result, the down projection's input."""

    @abc.abstractmethod
    def publish_hidden(
        self, section: Section, row: V, column: V, values: list[V], layer: Layer
    ) -> None:
        """Publishes some of the hidden state, where it need not be whole for that."""

    @abc.abstractmethod
    def publish_all_hidden(self, norm: V) -> None:
        """Publishes the block's whole hidden state for that norm, where it was not in parts."""

    @abc.abstractmethod
    def look_out(self, parts: Callable[[], list[V]], layer: Layer) -> None:
        """Before all threads poll for the parts of their hidden state, of which these are some."""

    @abc.abstractmethod
    def inputs_published(self, layer: Layer, phase: int) -> None:
        """All that the phase takes in has been published; `HEAD` stands for the next layer too."""

    def over_own(self, body: Callable[[V, V, V], None]) -> None:
        """`body` with address, row and first output of numbers of the block's hidden state."""
        each = M_TILE // self.consecutive

        def some(item: V) -> None:
            body(*self._own(item))

        block_stride_loop(self.work.count[O_PROJ] * (self.rows * each), THREADS, some)

    def _own(self, item: V) -> tuple[V, V, V]:
        n, each = self.consecutive, M_TILE // self.consecutive
        m_tile = self.work.first[O_PROJ] + item // each // self.rows
        own, row = self.own + item * (4 * n), item // each % self.rows
        return own, row, m_tile * M_TILE + item % each * n

    def _word(self, section: Section, width: int, row: V, column: V) -> V:
        """The address of a row's word in a section of `width` a row."""
        return self.exchange.at(section, row * width + column)

    def load_embeddings(self) -> None:
        """Loads the embeddings of this block's M-tiles into its hidden state."""
        d = self.plan.shape.hidden

        def take(own: V, row: V, out: V) -> None:
            at = self.given.hidden + ((row * d + out) << 2).wide()
            t.store_shared(own, t.load_global(at, self.consecutive))

        self.over_own(take)

    def qkv(self, streams: list[V], layer: Layer) -> list[V]:
        """Queries, keys and values, biases added."""
        width, first = self.plan.shape.qkv, self.work.first[QKV]
        self.await_input(QKV, layer)

        def bias(m_tile: V, out: V, there: V | None) -> list[V]:
            at = layer.index * width + (first + m_tile) * M_TILE + out
            return t.load_global(self.given.bias + (at << 2).wide(), self.consecutive, where=there)

        def epilogue(m_tile: V, row: V, out: V, total: Total, bias: list[V]) -> None:
            at, sums = (first + m_tile) * M_TILE + out, total(0)
            scale = self.scale(row)
            values = [x * scale + b.bits() for x, b in zip(sums, bias, strict=True)]
            kept = self.exchange.kept(Recorded.QKV, layer.index, row, width, at)
            publish(self._word(Section.QKV, width, row, at), values, layer.flag, kept)

        return self.product(streams, QKV, layer, epilogue, bias)

    def o_proj(self, streams: list[V], layer: Layer) -> list[V]:
        """Attention's result added to the hidden state."""
        self.await_input(O_PROJ, layer)
        if self.exchange.devices is not None:
            return self._o_proj_of_all(streams, layer)

        def epilogue(m_tile: V, row: V, out: V, total: Total, _: list[V]) -> None:
            own = self.own + ((m_tile * self.rows + row) * M_TILE + out) * 4
            before = t.load_shared_floats(own, self.consecutive)
            values = [x + y for x, y in zip(before, total(0), strict=True)]
            t.store_shared(own, values)
            at = (self.work.first[O_PROJ] + m_tile) * M_TILE + out
            self.publish_hidden(Section.ATTN_RESIDUAL, row, at, values, layer)

        streams = self.product(streams, O_PROJ, layer, epilogue)
        self.publish_all_hidden(layer.index * 2 + 1)
        return streams

    def _o_proj_of_all(self, streams: list[V], layer: Layer) -> list[V]:
        """Every device has some of the heads, so that all publish what they have of the sums."""

        def epilogue(m_tile: V, row: V, out: V, total: Total, _: list[V]) -> None:
            at = (self.work.first[O_PROJ] + m_tile) * M_TILE + out
            part = self.exchange.part(t.integer(0), 1)
            self._publish_part(Section.O_PARTS, row, at, part, total(0), layer)

        streams = self.product(streams, O_PROJ, layer, epilogue)
        self._add(Section.O_PARTS, self.exchange.count, Section.ATTN_RESIDUAL, layer)
        return streams

    def gate_up(self, streams: list[V], layer: Layer) -> list[V]:
        """silu(gate) * up; an M-tile has eight outputs of each."""
        height = M_TILE // 2
        self.await_input(GATE_UP, layer)

        def epilogue(m_tile: V, row: V, out: V, total: Total, _: list[V]) -> None:
            scale = self.scale(row)
            gates, ups = ([x * scale for x in total(below)] for below in (0, height))
            values = [gated(gate, up) for gate, up in zip(gates, ups, strict=True)]
            at = (self.work.first[GATE_UP] + m_tile) * height + out
            self.publish_ffn_act(row, at, values, layer)

        return self.product(streams, GATE_UP, layer, epilogue, height=height)

    def down(self, streams: list[V], layer: Layer) -> list[V]:
        """The block's part of the down projection."""
        self.await_input(DOWN, layer)

        def epilogue(m_tile: V, row: V, out: V, total: Total, _: list[V]) -> None:
            at = (self.work.first[DOWN] + m_tile) * M_TILE + out
            part = self.exchange.part(self.work.part, self.plan.phases[DOWN].parts)
            kept = self._kept_part(row, at, layer)
            self._publish_part(Section.DOWN_PARTS, row, at, part, total(0), layer, kept)

        return self.product(streams, DOWN, layer, epilogue)

    def _publish_part(
        self,
        section: Section,
        row: V,
        column: V,
        part: int | V,
        values: list[V],
        layer: Layer,
        kept: V | None = None,
    ) -> None:
        """Publishes some of a part of a sum, on all devices."""
        scope = self.exchange.scope
        for word in self.exchange.everywhere(self._part(section, row, column, part)):
            publish(word, values, layer.flag, kept, scope)

    def _part(self, section: Section, row: V, column: V, part: int | V) -> V:
        """The address of a word of a part of a sum."""
        return self._word(section, self.plan.shape.hidden, row + part * self.rows, column)

    def _kept_part(self, row: V, column: V, layer: Layer) -> V | None:
        if self.exchange.record is None:
            return None
        row_of_part, width = row + self.work.part * self.rows, self.plan.shape.hidden
        return self.exchange.kept(Recorded.DOWN_PARTS, layer.index, row_of_part, width, column)

    def _kept_hidden(self, section: Section, row: V, column: V, layer: Layer) -> V | None:
        """Of the hidden state after attention, or after the layer."""
        if self.exchange.record is None:
            return None
        what, turn = Recorded.ATTN_RESIDUAL, layer.index
        if section == Section.HIDDEN:
            what, turn = Recorded.HIDDEN, layer.index + 1
        return self.exchange.kept(what, turn, row, self.plan.shape.hidden, column)

    def add_parts(self, layer: Layer) -> None:
        """Adds the down projection's parts to the hidden state."""
        parts = self.plan.phases[DOWN].parts * self.exchange.count
        self._add(Section.DOWN_PARTS, parts, Section.HIDDEN, layer)

    def _add(self, section: Section, count: int, hidden: Section, layer: Layer) -> None:
        """Adds the parts of a sum to the hidden state of this block's M-tiles, and publishes it."""
        n, norm = self.consecutive, layer.index * 2 + (2 if hidden == Section.HIDDEN else 1)

        def parts(row: V, out: V) -> list[V]:
            return [self._part(section, row, out, i) for i in range(count)]

        def add(own: V, row: V, out: V) -> None:
            at, values = parts(row, out), t.load_shared_floats(own, n)
            for part in poll(at, n, layer.flag, scope=self.exchange.scope):
                values = [x + y for x, y in zip(values, part, strict=True)]
            t.store_shared(own, values)
            self.publish_hidden(hidden, row, out, values, layer)

        def every() -> None:
            self.look_out(lambda: parts(*self._own(t.integer(0))[1:]), layer)
            # Another thread wrote these numbers.
            t.block_barrier(THREADS)
            self.over_own(add)
            self.publish_all_hidden(norm)

        t.when(self.work.count[O_PROJ] > 0, every)

    def head(self, streams: list[V], layer: Layer) -> None:
        """The logits, on all devices."""
        vocab, devices = self.plan.shape.vocab, self.exchange.devices
        self.await_input(HEAD, layer)

        def epilogue(m_tile: V, row: V, out: V, total: Total, _: list[V]) -> None:
            in_row = self.exchange.part(row * self.exchange.count, 1) * vocab
            at = in_row + (self.work.first[HEAD] + m_tile) * M_TILE + out
            sums = total(0)
            scale = self.scale(row)
            values = [x * scale for x in sums]
            for logits in [self.given.logits] if devices is None else devices.logits:
                t.store_global(logits + (at << 2).wide(), values)

        self.product(streams, HEAD, layer, epilogue)

    def run(self) -> None:
        """Every layer, then the head."""
        layers, ended = self.plan.shape.layers, self.trace.ended

        def layer(index: V, streams: list[V]) -> list[V]:
            this = Layer.of(index, self.work.kinds(self.plan, index))
            ended("load_embeddings")
            self.attention.prefetch(index)
            streams = self.qkv(streams, this)
            ended("qkv")
            self.attention.attend(index, this.flag)
            ended("attend")
            self.attention.combine(index, this.flag)
            self.inputs_published(this, O_PROJ)
            ended("combine")
            streams = self.o_proj(streams, this)
            self.inputs_published(this, GATE_UP)
            ended("o_proj")
            streams = self.gate_up(streams, this)
            self.inputs_published(this, DOWN)
            ended("gate_up")
            streams = self.down(streams, this)
            ended("down")
            self.add_parts(this)
            self.inputs_published(this, HEAD)
            ended("add_parts")
            return streams

        streams = t.loop(layers, self.start(), layer)
        self.head(streams, Layer.of(t.integer(layers)))
        ended("head")
