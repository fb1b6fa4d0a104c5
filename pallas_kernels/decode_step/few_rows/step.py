"""A step of few rows: whole inputs are absorbed into shared memory as their numbers are published.

Every input of a product goes through the flagged exchange, float32 with a flag in each number, so
that no block waits for more than what it reads. A norm's sum of squares is made of what is
absorbed, and its scale known when the product is.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from pallas_kernels.decode_step.common.exchange import Section, publish
from pallas_kernels.decode_step.common.phases import (
    NORMED,
    Epilogue,
    Layer,
    Phases,
    Prepare,
    nothing,
)
from pallas_kernels.decode_step.common.record import Recorded
from pallas_kernels.decode_step.common.ring import RingState
from pallas_kernels.decode_step.few_rows.inputs import Inputs
from pallas_kernels.decode_step.few_rows.products import Products
from pallas_kernels.decode_step.packed.plan import DOWN, GATE_UP, HEAD, O_PROJ, QKV
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V

SECTIONS = {
    QKV: Section.HIDDEN,
    O_PROJ: Section.ATTN_OUT,
    GATE_UP: Section.ATTN_RESIDUAL,
    DOWN: Section.FFN_ACT,
    HEAD: Section.HIDDEN,
}
"""The section of each phase's input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Phases):
    """One block's part of a step of few rows."""

    inputs: Inputs
    products: Products

    consecutive: ClassVar[int] = 1

    def start(self) -> list[V]:
        return [*RingState.first()]

    def await_input(self, phase: int, layer: Layer) -> None:
        """Absorbs it, where this block has M-tiles of the phase."""
        p = self.plan.phases[phase]
        quads: int | V = p.columns // 4
        begin = self.exchange.at(SECTIONS[phase])
        if phase == DOWN:
            quads = self.work.part_tiles * (K_TILE // 4)
            begin = begin + (self.work.part_column * (4 * K_TILE)).wide()
        weights = None
        if phase in NORMED:
            norm = layer.index * 2 + (1 if phase == GATE_UP else 0)
            weights = self.given.norms + norm.wide() * (4 * self.plan.shape.hidden)
        flag = layer.before if phase in (QKV, HEAD) else layer.flag
        most, format = p.longest * K_TILE // 4, p.format
        averaged = any(storage.addends for storage in p.storages)
        t.when(
            self.work.count[phase] > 0,
            lambda: self.inputs.absorb(
                begin, p.columns, quads, most, flag, format, averaged, weights
            ),
        )

    def product(
        self,
        streams: list[V],
        phase: int,
        layer: Layer,
        epilogue: Epilogue,
        prepare: Prepare = nothing,
        height: int = M_TILE,
    ) -> list[V]:
        p, m_tiles, state = self.plan.phases[phase], self.work.count[phase], RingState(*streams)
        kind = self.work.kind(self.plan, phase, layer.kinds)
        tiles, product, stages = self.work.tiles(p), self.products.product, self.products.cut[phase]
        return [*product(state, p, stages, m_tiles, tiles, epilogue, prepare, height, kind)]

    def scale(self, row: V) -> V:
        shape = self.plan.shape
        return t.rsqrt(self.inputs.mean_square(row, shape.hidden) + shape.eps)

    def publish_ffn_act(self, row: V, column: V, values: list[V], layer: Layer) -> None:
        width = self.plan.shape.packed_ffn
        kept = self.exchange.kept(Recorded.FFN_ACT, layer.index, row, width, column)
        publish(self._word(Section.FFN_ACT, width, row, column), values, layer.flag, kept)

    def publish_hidden(
        self, section: Section, row: V, column: V, values: list[V], layer: Layer
    ) -> None:
        kept = self._kept_hidden(section, row, column, layer)
        publish(self._word(section, self.plan.shape.hidden, row, column), values, layer.flag, kept)

    def publish_all_hidden(self, norm: V) -> None:
        """It was published number by number."""

    def look_out(self, parts: Callable[[], list[V]], layer: Layer) -> None:
        """Not one thread alone: those that poll are few."""

    def inputs_published(self, layer: Layer, phase: int) -> None:
        """Every number says by its flag that it is there."""
