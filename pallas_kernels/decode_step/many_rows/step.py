"""A step of many rows: inputs of products stream through shared memory, in 16 bits.

Queries, keys and values, the splits of long contexts and the parts of the down projection go
through the flagged exchange, as in a step of few rows. Inputs of products are 16-bit numbers, which
have no room for a flag: a grid barrier comes before they are read.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from pallas_kernels.decode_step.common.exchange import Section, poll
from pallas_kernels.decode_step.common.launch import THREADS
from pallas_kernels.decode_step.common.phases import (
    NORMED,
    Epilogue,
    Layer,
    Phases,
    Prepare,
    Total,
    nothing,
)
from pallas_kernels.decode_step.common.record import Recorded
from pallas_kernels.decode_step.many_rows.inputs import InputLayout
from pallas_kernels.decode_step.many_rows.layout import GRID_BARRIER, MOST_ROWS, SQUARES
from pallas_kernels.decode_step.many_rows.products import Products, StreamStates
from pallas_kernels.decode_step.many_rows.side_warps import GRID_PASSED, SCALED, WITH_SCALERS
from pallas_kernels.decode_step.packed.plan import DOWN, GATE_UP, HEAD, O_PROJ
from pallas_kernels.decode_step.packed.tile import M_TILE
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import times
from pallas_kernels.decode_step.ptx.loops import block_stride_loop
from pallas_kernels.decode_step.ptx.thread import V


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Phases):
    """One block's part of a step of many rows.

    Attributes:
        scales: shared memory for what each row's product is multiplied with after a norm, then for
            what its next hidden state is multiplied with to be an input.
    """

    inputs: InputLayout
    products: Products
    scales: V

    consecutive: ClassVar[int] = 4

    def run(self) -> None:
        # The first grid barrier was passed where the exchange was cleared.
        t.block_barrier_arrive(WITH_SCALERS, GRID_PASSED)
        super().run()

    def start(self) -> list[V]:
        return StreamStates.first().carry()

    def await_input(self, phase: int, layer: Layer) -> None:
        """A warp of its own fetches it."""

    def product(
        self,
        streams: list[V],
        phase: int,
        layer: Layer,
        epilogue: Epilogue,
        prepare: Prepare = nothing,
        height: int = M_TILE,
    ) -> list[V]:
        p, m_tiles = self.plan.phases[phase], self.work.count[phase]
        scale = 1 / self._input_scale(phase)

        def finish(m_tile: V, row: V, out: V, total: Total) -> None:
            def unscaled(below: int) -> list[V]:
                return [times(x, scale) for x in total(below)]

            # Not before: while it multiplies, sums fill the registers.
            prepared = prepare(m_tile, out, None)
            epilogue(m_tile, row, out, unscaled, prepared)

        def scaled() -> None:
            if phase in NORMED:
                t.block_barrier(WITH_SCALERS, SCALED)
                self._keep_scales(phase, layer)

        states, tiles = StreamStates.carried(streams), self.work.tiles(p)
        kind = self.work.kind(self.plan, phase, layer.kinds)
        group, product = self.products.weights.groups[phase], self.products.product
        return product(states, p, group, m_tiles, tiles, finish, scaled, height, kind).carry()

    def _input_scale(self, phase: int) -> float:
        """What the phase's input was multiplied with, besides norms.

        Gate and up's product overflows float16; attention's result is no larger than its values.
        """
        return self.inputs.format.scale if phase == DOWN else 1.0

    def scale(self, row: V) -> V:
        return t.load_shared_floats(self.scales + row * 4)[0]

    def _keep_scales(self, phase: int, layer: Layer) -> None:
        """Keeps the scales of a norm, in a launch that records; one block does."""
        if self.exchange.record is None:
            return
        norm, thread = layer.index * 2 + (1 if phase == GATE_UP else 0), t.thread_id()
        begin = self.exchange.record.at(Recorded.SCALES, norm)

        def keep() -> None:
            scale = t.load_shared(self.scales + thread * 4)
            t.store_global(begin + (thread << 2).wide(), scale)

        t.block_barrier(THREADS)
        t.when(t.cta_id().equals(0) & (thread < self.rows), keep)

    def publish_ffn_act(self, row: V, column: V, values: list[V], layer: Layer) -> None:
        scale, kept = self._input_scale(DOWN), self.exchange.kept(Recorded.FFN_ACT, layer.index)
        self._put(Section.FFN_ACT, row, column, [times(x, scale) for x in values], kept)

    def _put(self, section: Section, row: V, column: V, values: list[V], kept: V | None) -> None:
        self.inputs.put(self.exchange.at(section), row, column, values, kept)

    def publish_hidden(
        self, section: Section, row: V, column: V, values: list[V], layer: Layer
    ) -> None:
        """All of a row's M-tile is needed for its squares. It is kept as this block has it."""
        kept = self._kept_hidden(section, row, column, layer)
        if kept is not None:
            t.store_global(kept, values)

    def load_embeddings(self) -> None:
        super().load_embeddings()
        if self.exchange.record is not None:
            self.over_own(self._keep_embeddings)
        self._publish_all_hidden(t.integer(0), scaled=False)
        barriers.before_copies()

    def _keep_embeddings(self, own: V, row: V, out: V) -> None:
        kept = self.exchange.kept(Recorded.HIDDEN, 0, row, self.plan.shape.hidden, out)
        assert kept is not None
        t.store_global(kept, t.load_shared(own, 4))

    def publish_all_hidden(self, norm: V) -> None:
        self._publish_all_hidden(norm, scaled=True)

    def _publish_all_hidden(self, norm: V, scaled: bool) -> None:
        """The block's hidden state as an input, with a norm's weights, and its squares.

        The norm's scale isn't known before all squares are. Numbers are multiplied with the scale
        of the norm before, lest float16 overflow; their products take the rest of it. Embeddings,
        which have no norm before them, enter as they are: times the norm's weights, they must be
        below 65504 in float16.
        """
        weights = self.given.norms + norm.wide() * (4 * self.plan.shape.hidden)
        t.block_barrier(THREADS)

        def four(own: V, row: V, out: V) -> None:
            weight = t.load_global(weights + (out << 2).wide(), 4)
            values = t.load_shared_floats(own, 4)
            values = [v * x.bits() for v, x in zip(values, weight, strict=True)]
            if scaled:
                (scale,) = t.load_shared_floats(self.scales + (row + MOST_ROWS) * 4)
                values = [v * scale for v in values]
            self._put(Section.HIDDEN, row, out, values, self.exchange.kept(Recorded.NORMED, norm))

        def squares(item: V) -> None:
            """Of an M-tile of a row."""
            at = self.own + item * (M_TILE * 4)
            values = [v for n in range(0, M_TILE, 4) for v in t.load_shared_floats(at + 4 * n, 4)]
            total = sum((v * v for v in values[1:]), start=values[0] * values[0])
            m_tile = self.work.first[O_PROJ] + item // self.rows
            index = m_tile * MOST_ROWS + item % self.rows
            t.store_global(self.exchange.at(SQUARES, index), [total])

        self.over_own(four)
        block_stride_loop(self.work.count[O_PROJ] * self.rows, THREADS, squares)

    def look_out(self, parts: Callable[[], list[V]], layer: Layer) -> None:
        """One thread looks out for words of every part.

        If all of them did, in every block, they would slow down what they wait for.
        """
        t.when(
            t.thread_id().equals(0), lambda: poll(parts(), 1, layer.flag, scope=self.exchange.scope)
        )

    def inputs_published(self, layer: Layer, phase: int) -> None:
        """The grid barrier before the phase; the warps that make a norm's scale wait for it too."""
        counter = self.exchange.at(GRID_BARRIER)
        barriers.before_copies()
        t.block_barrier(THREADS)

        def wait() -> None:
            barriers.count_arrival(counter)
            barriers.await_count(counter, (layer.index * HEAD + phase) * self.plan.blocks)

        t.when(t.thread_id().equals(0), wait)
        t.block_barrier(THREADS)
        if phase in NORMED:
            t.block_barrier_arrive(WITH_SCALERS, GRID_PASSED)
