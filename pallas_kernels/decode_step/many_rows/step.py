"""The phases of a step of many rows on one block, each a function, and their order.

Queries, keys and values, the splits of long contexts and the parts of the down projection go
through the flagged exchange, as in a step of few rows. Inputs of products are 16-bit numbers, which
have no room for a flag: a grid barrier comes before they are read.
"""

import dataclasses
from collections.abc import Callable

from pallas_kernels.decode_step.common import exchange
from pallas_kernels.decode_step.common.exchange import poll, publish
from pallas_kernels.decode_step.few_rows.products import THREADS
from pallas_kernels.decode_step.few_rows.step import Share, gated
from pallas_kernels.decode_step.many_rows.inputs import InputLayout
from pallas_kernels.decode_step.many_rows.layout import GRID_BARRIER, MOST_ROWS, SQUARES
from pallas_kernels.decode_step.many_rows.products import Finish, Products, StreamStates, Total
from pallas_kernels.decode_step.many_rows.side_warps import GRID_PASSED, SCALED, WITH_SCALERS
from pallas_kernels.decode_step.packed.plan import DOWN, GATE_UP, HEAD, M_TILE, O_PROJ, QKV
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import times
from pallas_kernels.decode_step.ptx.loops import block_stride_loop
from pallas_kernels.decode_step.ptx.thread import V


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Share):
    """One block's part of a step of many rows.

    Attributes:
        attention: of the block's first out and key/value head.
        scales: shared memory for what each row's product is multiplied with after a norm, then for
            what its next hidden state is multiplied with to be an input.
    """

    inputs: InputLayout
    products: Products
    scales: V

    @property
    def rows(self) -> int:
        return self.inputs.rows

    def put(self, section: int, row: V, column: V, values: list[V]) -> None:
        """Publishes numbers of a product's input, for after the grid barrier."""
        self.inputs.put(self.layout.at(self.memory, section), row, column, values)

    def _grid_barrier(self, number: V, norm: bool = False) -> None:
        """Waits until all blocks have come to the grid barrier of this number, from 1.

        `norm` tells the warps that make scales.
        """
        counter = self.layout.at(self.memory, GRID_BARRIER)
        barriers.before_copies()
        t.block_barrier(THREADS)

        def wait() -> None:
            barriers.count_arrival(counter)
            barriers.await_count(counter, number * self.plan.blocks)

        t.when(t.thread_id().equals(0), wait)
        t.block_barrier(THREADS)
        if norm:
            t.block_barrier_arrive(WITH_SCALERS, GRID_PASSED)

    def _product(
        self,
        states: StreamStates,
        phase: int,
        finish: Finish,
        norm: bool = False,
        height: int = M_TILE,
    ) -> StreamStates:
        """A phase's product, after a norm or not."""
        p = self.plan.phases[phase]
        tiles = self.work.tiles(p)

        def scaled() -> None:
            if norm:
                t.block_barrier(WITH_SCALERS, SCALED)

        m_tiles = self.work.count[phase]
        return self.products.product(states, p, m_tiles, tiles, finish, scaled, height)

    def _scale(self, row: V) -> V:
        return t.load_shared_floats(self.scales + row * 4)[0]

    def _own(self, item: V) -> tuple[V, V, V]:
        """Of four numbers of the block's hidden state: their address, row and first output."""
        rest = item // (M_TILE // 4)
        m_tile = self.work.first[O_PROJ] + rest // self.rows
        return self.own + item * 16, rest % self.rows, m_tile * M_TILE + item % (M_TILE // 4) * 4

    def _over_own(self, body: Callable[[V], None]) -> None:
        block_stride_loop(self.work.count[O_PROJ] * (self.rows * M_TILE // 4), THREADS, body)

    def _publish_hidden(self, norm: V, scaled: bool = True) -> None:
        """The block's hidden state as an input, with a norm's weights, and its squares.

        The norm's scale isn't known before all squares are. Numbers are multiplied with the scale
        of the norm before, lest float16 overflow; their products take the rest of it. Embeddings,
        which have no norm before them, enter as they are.
        """
        weights = self.norms + norm.wide() * (4 * self.plan.shape.hidden)
        t.block_barrier(THREADS)

        def four(item: V) -> None:
            own, row, out = self._own(item)
            weight = t.load_global(weights + (out << 2).wide(), 4)
            values = t.load_shared_floats(own, 4)
            values = [v * x.bits() for v, x in zip(values, weight, strict=True)]
            if scaled:
                (scale,) = t.load_shared_floats(self.scales + (row + MOST_ROWS) * 4)
                values = [v * scale for v in values]
            self.put(exchange.HIDDEN, row, out, values)

        def squares(item: V) -> None:
            """Of an M-tile of a row."""
            at = self.own + item * (M_TILE * 4)
            values = [v for n in range(0, M_TILE, 4) for v in t.load_shared_floats(at + 4 * n, 4)]
            total = sum((v * v for v in values[1:]), start=values[0] * values[0])
            m_tile = self.work.first[O_PROJ] + item // self.rows
            index = m_tile * MOST_ROWS + item % self.rows
            t.store_global(self.layout.at(self.memory, SQUARES, index), [total])

        self._over_own(four)
        block_stride_loop(self.work.count[O_PROJ] * self.rows, THREADS, squares)

    def load_embeddings(self) -> None:
        """Loads the embeddings of this block's M-tiles into its hidden state."""
        d = self.plan.shape.hidden

        def take(item: V) -> None:
            own, row, out = self._own(item)
            t.store_shared(own, t.load_global(self.hidden + ((row * d + out) << 2).wide(), 4))

        self._over_own(take)
        self._publish_hidden(t.integer(0), scaled=False)
        barriers.before_copies()

    def qkv(self, states: StreamStates, layer: V, flag: V) -> StreamStates:
        """Queries, keys and values, biases added."""
        width = self.plan.shape.qkv

        def finish(m_tile: V, row: V, out: V, total: Total) -> None:
            at = (self.work.first[QKV] + m_tile) * M_TILE + out
            bias = t.load_global(self.bias + ((layer * width + at) << 2).wide(), 4)
            scale = self._scale(row)
            values = [x * scale + b.bits() for x, b in zip(total(0), bias, strict=True)]
            publish(self.word(exchange.QKV, width, row, at), values, flag)

        return self._product(states, QKV, finish, norm=True)

    def attend(self, layer: V, flag: V) -> None:
        """Attention of every out and key/value head that is this block's turn."""
        blocks = self.plan.blocks
        units = self.rows * self.plan.shape.kv_heads * self.attention.splits

        def unit(i: V, _: list[V]) -> list[V]:
            mine = self.attention.cta + i * blocks
            dataclasses.replace(self.attention, cta=mine).attend(layer, flag)
            return []

        t.loop(-(-units // blocks), [], unit)

    def o_proj(self, states: StreamStates, layer: V) -> StreamStates:
        """Attention's result back into the hidden state."""

        def finish(m_tile: V, row: V, out: V, total: Total) -> None:
            own = self.own + ((m_tile * self.rows + row) * M_TILE + out) * 4
            before = t.load_shared_floats(own, 4)
            t.store_shared(own, [x + y for x, y in zip(before, total(0), strict=True)])

        states = self._product(states, O_PROJ, finish)
        self._publish_hidden(layer * 2 + 1)
        return states

    def gate_up(self, states: StreamStates) -> StreamStates:
        """silu(gate) * up; an M-tile has eight outputs of each."""
        height = M_TILE // 2

        def finish(m_tile: V, row: V, out: V, total: Total) -> None:
            scale = self._scale(row)
            values = []
            for gate, up in zip(total(0), total(height), strict=True):
                gate, up = gate * scale, up * scale
                values.append(times(gated(gate, up), self.inputs.format.scale))
            self.put(exchange.FFN, row, (self.work.first[GATE_UP] + m_tile) * height + out, values)

        return self._product(states, GATE_UP, finish, norm=True, height=height)

    def down(self, states: StreamStates, flag: V) -> StreamStates:
        """The block's part of the down projection."""
        width = self.plan.shape.hidden

        def finish(m_tile: V, row: V, out: V, total: Total) -> None:
            at = (self.work.first[DOWN] + m_tile) * M_TILE + out
            row_of_part = self.work.part * self.rows + row
            values = [times(x, 1 / self.inputs.format.scale) for x in total(0)]
            publish(self.word(exchange.PARTS, width, row_of_part, at), values, flag)

        return self._product(states, DOWN, finish)

    def add_parts(self, layer: V, flag: V) -> None:
        """Adds the down projection's parts to the hidden state of this block's M-tiles."""
        width, parts = self.plan.shape.hidden, self.plan.phases[DOWN].parts

        def of(item: V) -> list[V]:
            _, row, out = self._own(item)
            return [
                self.word(exchange.PARTS, width, row + n * self.rows, out) for n in range(parts)
            ]

        def add(item: V) -> None:
            own, at = self.own + item * 16, of(item)
            values = t.load_shared_floats(own, 4)
            for part in poll(at, 4, flag):
                values = [x + y for x, y in zip(values, part, strict=True)]
            t.store_shared(own, values)

        # One thread looks out for words of every part. If all of them did, in every block, they
        # would slow down what they wait for.
        first = t.thread_id().equals(0) & (self.work.count[O_PROJ] > 0)
        t.when(first, lambda: poll(of(t.integer(0)), 1, flag))
        t.block_barrier(THREADS)
        self._over_own(add)
        self._publish_hidden(layer * 2 + 2)

    def head(self, states: StreamStates) -> None:
        """The logits."""
        vocab = self.plan.shape.vocab

        def finish(m_tile: V, row: V, out: V, total: Total) -> None:
            at = row * vocab + (self.work.first[HEAD] + m_tile) * M_TILE + out
            scale = self._scale(row)
            t.store_global(self.logits + (at << 2).wide(), [x * scale for x in total(0)])

        self._product(states, HEAD, finish, norm=True)

    def run(self) -> None:
        """Every layer, then the head; a grid barrier comes before all products but the first.

        A layer's flag is the parity of its number, from 1.
        """
        # The first one was passed where the exchange was cleared.
        t.block_barrier_arrive(WITH_SCALERS, GRID_PASSED)

        def layer(index: V, carry: list[V]) -> list[V]:
            states, flag = StreamStates.carried(carry), (index + 1) & 1
            passed = index * HEAD
            self.ended("load_embeddings")
            self.attention.prefetch(index)
            states = self.qkv(states, index, flag)
            self.ended("qkv")
            self.attend(index, flag)
            self.ended("attend")
            self.attention.combine(flag)
            self._grid_barrier(passed + 1)
            self.ended("combine")
            states = self.o_proj(states, index)
            self._grid_barrier(passed + 2, norm=True)
            self.ended("o_proj")
            states = self.gate_up(states)
            self._grid_barrier(passed + 3)
            self.ended("gate_up")
            states = self.down(states, flag)
            self.ended("down")
            self.add_parts(index, flag)
            self._grid_barrier(passed + 4, norm=True)
            self.ended("add_parts")
            return states.carry()

        self.head(
            StreamStates.carried(
                t.loop(self.plan.shape.layers, StreamStates.first().carry(), layer)
            )
        )
        self.ended("head")
