"""The phases of a decode step on one block, each a function, and their order."""

import dataclasses

from pallas_kernels.decode_step.common import exchange
from pallas_kernels.decode_step.common.attention import Attention
from pallas_kernels.decode_step.common.exchange import Layout, poll, publish
from pallas_kernels.decode_step.common.ring import RingState
from pallas_kernels.decode_step.few_rows.products import (
    THREADS,
    Finish,
    Prepare,
    Products,
    Total,
    nothing,
)
from pallas_kernels.decode_step.packed.plan import (
    DOWN,
    GATE_UP,
    HEAD,
    K_TILE,
    M_TILE,
    O_PROJ,
    QKV,
    Phase,
    StepPlan,
)
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.loops import block_stride_loop
from pallas_kernels.decode_step.ptx.thread import V

PHASES = (
    "load_embeddings",
    "qkv",
    "attend",
    "combine",
    "o_proj",
    "gate_up",
    "down",
    "add_parts",
    "head",
)
"""What a trace tells the end of, in order: of the last layer, and of the head."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What the plan's table says of a block: its M-tiles, and its part of the down projection."""

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
        """In each of the block's M-tiles: of its part, where the columns are cut into parts."""
        return self.part_tiles if phase.parts > 1 else phase.across


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """One block's part of a step, of few rows or of many.

    Attributes:
        own: shared memory for the hidden state of the block's M-tiles, `[m_tiles, rows, 16]`.
        bias, norms, hidden: addresses of the inputs.
        logits: of the output.
        memory, layout: of the exchange.
        times: of a trace, where there is one: int32 for every phase.
    """

    plan: StepPlan
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
            t.when(t.thread_id().equals(0), lambda: t.store_global(at, [t.nanoseconds()]))

    def word(self, section: int, width: int, row: V, at: V) -> V:
        """The address of a row's word in a section of `width` a row."""
        return self.layout.at(self.memory, section, row * width + at)


def gated(gate: V, up: V) -> V:
    """silu(gate) * up."""
    return gate * t.reciprocal(t.exp2(gate * -t.LOG2_E) + 1.0) * up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Share):
    """One block's part of a step of few rows."""

    rows: int
    products: Products

    def _scale(self, row: V) -> V:
        """What a norm multiplies by; it waits for the product's results."""
        shape = self.plan.shape
        mean = self.products.mean_square(row, shape.hidden)
        return t.rsqrt(mean + shape.eps)

    def _absorb(self, phase: int, section: int, width: int, flag: V, norm: V | None = None) -> None:
        """A phase's input, where this block has M-tiles of it."""
        quads: int | V = self.plan.phases[phase].columns // 4
        most = self.plan.phases[phase].longest * K_TILE // 4
        begin = self.layout.at(self.memory, section)
        if phase == DOWN:
            quads = self.work.part_tiles * (K_TILE // 4)
            begin = begin + (self.work.part_column * (4 * K_TILE)).wide()
        weights = None
        if norm is not None:
            weights = self.norms + norm.wide() * (4 * self.plan.shape.hidden)
        t.when(
            self.work.count[phase] > 0,
            lambda: self.products.absorb(begin, width, quads, most, flag, weights),
        )

    def _product(
        self,
        state: RingState,
        phase: int,
        finish: Finish,
        prepare: Prepare = nothing,
        height: int = M_TILE,
    ) -> RingState:
        p, m_tiles = self.plan.phases[phase], self.work.count[phase]
        tiles = self.work.tiles(p)
        return self.products.product(state, p, m_tiles, tiles, finish, prepare, height)

    def load_embeddings(self) -> None:
        """Loads the embeddings of this block's M-tiles into its hidden state."""
        d = self.plan.shape.hidden

        def take(item: V) -> None:
            at, row, out = self._own(item)
            word = t.load_global(self.hidden + ((row * d + out) << 2).wide())
            t.store_shared(at, word)

        block_stride_loop(self.work.count[O_PROJ] * (self.rows * M_TILE), THREADS, take)

    def _own(self, item: V) -> tuple[V, V, V]:
        """Of a number of the block's hidden state: its address, row and output."""
        rest = item // M_TILE
        m_tile = self.work.first[O_PROJ] + rest // self.rows
        return self.own + item * 4, rest % self.rows, m_tile * M_TILE + item % M_TILE

    def qkv(self, state: RingState, layer: V, flag: V, before: V) -> RingState:
        """Queries, keys and values of the hidden state that `before` flags, biases added."""
        width = self.plan.shape.qkv
        self._absorb(QKV, exchange.HIDDEN, self.plan.shape.hidden, before, layer * 2)

        def bias(m_tile: V, out: V, there: V) -> list[V]:
            at = layer * width + (self.work.first[QKV] + m_tile) * M_TILE + out
            return t.load_global(self.bias + (at << 2).wide(), where=there)

        def finish(m_tile: V, row: V, out: V, total: Total, bias: list[V]) -> None:
            at = (self.work.first[QKV] + m_tile) * M_TILE + out
            value = total(out) * self._scale(row) + bias[0].bits()
            publish(self.word(exchange.QKV, width, row, at), [value], flag)

        return self._product(state, QKV, finish, bias)

    def o_proj(self, state: RingState, flag: V) -> RingState:
        """Attention's result back into the hidden state."""
        shape = self.plan.shape
        self._absorb(O_PROJ, exchange.ATTENDED, shape.heads * shape.head_dim, flag)

        def finish(m_tile: V, row: V, out: V, total: Total, _: list[V]) -> None:
            own = self.own + ((m_tile * self.rows + row) * M_TILE + out) * 4
            value = t.load_shared_floats(own)[0] + total(out)
            t.store_shared(own, [value])
            at = (self.work.first[O_PROJ] + m_tile) * M_TILE + out
            publish(self.word(exchange.MIDDLE, shape.hidden, row, at), [value], flag)

        return self._product(state, O_PROJ, finish)

    def gate_up(self, state: RingState, layer: V, flag: V) -> RingState:
        """silu(gate) * up; an M-tile has eight outputs of each."""
        self._absorb(GATE_UP, exchange.MIDDLE, self.plan.shape.hidden, flag, layer * 2 + 1)
        height = M_TILE // 2

        def finish(m_tile: V, row: V, out: V, total: Total, _: list[V]) -> None:
            scale = self._scale(row)
            gate, up = total(out) * scale, total(out + height) * scale
            value = gated(gate, up)
            at = (self.work.first[GATE_UP] + m_tile) * height + out
            publish(self.word(exchange.FFN, self.plan.shape.ffn, row, at), [value], flag)

        return self._product(state, GATE_UP, finish, height=height)

    def down(self, state: RingState, flag: V) -> RingState:
        """The block's part of the down projection."""
        shape = self.plan.shape
        self._absorb(DOWN, exchange.FFN, shape.ffn, flag)

        def finish(m_tile: V, row: V, out: V, total: Total, _: list[V]) -> None:
            at = (self.work.first[DOWN] + m_tile) * M_TILE + out
            row_of_part = self.work.part * self.rows + row
            publish(self.word(exchange.PARTS, shape.hidden, row_of_part, at), [total(out)], flag)

        return self._product(state, DOWN, finish)

    def add_parts(self, flag: V) -> None:
        """Adds the down projection's parts to the hidden state of this block's M-tiles."""
        shape, parts = self.plan.shape, self.plan.phases[DOWN].parts

        def add(item: V) -> None:
            own, row, out = self._own(item)
            at = [
                self.word(exchange.PARTS, shape.hidden, row + part * self.rows, out)
                for part in range(parts)
            ]
            value = t.load_shared_floats(own)[0]
            for (part,) in poll(at, 1, flag):
                value = value + part
            t.store_shared(own, [value])
            publish(self.word(exchange.HIDDEN, shape.hidden, row, out), [value], flag)

        def every() -> None:
            # Another thread wrote these numbers.
            t.block_barrier(THREADS)
            block_stride_loop(self.work.count[O_PROJ] * (self.rows * M_TILE), THREADS, add)

        t.when(self.work.count[O_PROJ] > 0, every)

    def head(self, state: RingState, flag: V) -> None:
        """The logits."""
        shape = self.plan.shape
        self._absorb(HEAD, exchange.HIDDEN, shape.hidden, flag, t.integer(2 * shape.layers))

        def finish(m_tile: V, row: V, out: V, total: Total, _: list[V]) -> None:
            at = row * shape.vocab + (self.work.first[HEAD] + m_tile) * M_TILE + out
            value = total(out) * self._scale(row)
            t.store_global(self.logits + (at << 2).wide(), [value])

        self._product(state, HEAD, finish)

    def run(self) -> None:
        """Every layer, then the head. A layer's flag is the parity of its number, from 1."""
        layers = self.plan.shape.layers

        def layer(index: V, carry: list[V]) -> list[V]:
            state, flag, before = RingState(*carry), (index + 1) & 1, index & 1
            self.ended("load_embeddings")
            self.attention.prefetch(index)
            state = self.qkv(state, index, flag, before)
            self.ended("qkv")
            self.attention.attend(index, flag)
            self.ended("attend")
            self.attention.combine(flag)
            self.ended("combine")
            state = self.o_proj(state, flag)
            self.ended("o_proj")
            state = self.gate_up(state, index, flag)
            self.ended("gate_up")
            state = self.down(state, flag)
            self.ended("down")
            self.add_parts(flag)
            self.ended("add_parts")
            return [*state]

        state = RingState(*t.loop(layers, [*RingState.first()], layer))
        self.head(state, t.integer(layers & 1))
        self.ended("head")
