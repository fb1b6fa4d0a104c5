"""What the warps do that don't multiply, besides fetching weights: inputs, and scales of norms."""

from pallas_kernels.decode_step.common.ring import Place, Ring
from pallas_kernels.decode_step.common.words import Layout
from pallas_kernels.decode_step.few_rows.products import THREADS
from pallas_kernels.decode_step.few_rows.step import Work
from pallas_kernels.decode_step.many_rows.exchange import INPUTS, MEETINGS, MOST_ROWS, SQUARES
from pallas_kernels.decode_step.many_rows.pages import Group
from pallas_kernels.decode_step.many_rows.texts import Texts
from pallas_kernels.decode_step.packed.packing import WARPS
from pallas_kernels.decode_step.packed.plan import BAND, HEAD, Plan
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import Format, times
from pallas_kernels.decode_step.ptx.thread import V

SCALERS = 2
"""Warps that make the scales of norms, 32 texts each."""
WITH_SCALERS = THREADS + SCALERS * t.WARP
MET, SCALED = t.OURS + 1, t.OURS + 2
"""Barriers of these threads: all blocks have met in front of a norm; its scales are made."""
LOADS_AT_ONCE = 5
"""Sums of squares that one of their lanes loads together, four texts each."""


def fetch_inputs(
    plan: Plan, texts: Texts, layout: Layout, memory: V, work: Work, chunks: Ring, cleared: V
) -> None:
    """Copies every chunk of every input the block needs, in order; for one thread alone.

    Args:
        memory: address of the words.
        cleared: an mbarrier whose first turn ends when the words have been cleared.
    """
    counter = layout.at(memory, MEETINGS)
    barriers.await_turn(cleared, t.integer(0))

    def copied(phase: int, meetings: V, carry: list[V]) -> list[V]:
        p = plan.phases[phase]
        group = Group.of(p)
        first, tiles = work.part_column if p.parts > 1 else t.integer(0), work.tiles(p)
        begin = layout.at(memory, INPUTS[phase])
        barriers.await_count(counter, meetings * plan.blocks)
        barriers.before_copies()

        def chunk(i: V, carry: list[V]) -> list[V]:
            place = Place(*carry)
            # A slot that was never used is empty: the turn before the first is over.
            barriers.await_turn(chunks.empty(place.slot), place.parity ^ 1)
            piece = first * WARPS + i * group.pieces
            source = begin + (piece * texts.piece_bytes).wide()
            target = chunks.memory + place.slot * chunks.slot_bytes
            size = t.integer(group.pieces * texts.piece_bytes)
            barriers.copy_in(target, source, size, chunks.full(place.slot))
            return [*chunks.next(place)]

        def turn(_: V, carry: list[V]) -> list[V]:
            return t.loop(group.pages(tiles), carry, chunk)

        return t.loop(group.turns(work.count[phase]), carry, turn)

    def layer(index: V, carry: list[V]) -> list[V]:
        for phase in range(HEAD):
            carry = copied(phase, index * HEAD + phase, carry)
        return carry

    layers = plan.shape.layers
    copied(HEAD, t.integer(layers * HEAD), t.loop(layers, [*Place.begin()], layer))


def make_scales(plan: Plan, layout: Layout, format: Format, memory: V, which: V, scales: V) -> None:
    """The scales of every norm, in order, while its product runs; for one warp.

    Eight lanes have four texts' sums of squares each of every fourth band.

    Args:
        format: of the inputs of products.
        memory: address of the words.
        which: of the warps.
        scales: as `Step` has them.
    """
    shape, lane = plan.shape, t.me() % t.WARP
    bands, fours, own = shape.hidden // BAND, lane % 8, lane // 8
    text = which * t.WARP + fours * 4
    begin = layout.at(memory, SQUARES, own * MOST_ROWS + text)

    def norm(_: V, before: list[V]) -> list[V]:
        """Of four texts what the next input is made with, from what this one was made with."""
        t.together(WITH_SCALERS, MET)

        def some(i: V, sums: list[V]) -> list[V]:
            wanted = [own + (i * LOADS_AT_ONCE + n) * 4 for n in range(LOADS_AT_ONCE)]
            at = begin + (i * (LOADS_AT_ONCE * 4 * MOST_ROWS * 4)).wide()
            loaded = [
                t.load_global(
                    at, 4, "relaxed.gpu", where=band < bands, offset=n * 4 * MOST_ROWS * 4
                )
                for n, band in enumerate(wanted)
            ]
            for four in loaded:
                sums = [x + y.bits() for x, y in zip(sums, four, strict=True)]
            return sums

        turns = -(-bands // (4 * LOADS_AT_ONCE))
        sums = [t.warp_sum(x, (8, 16)) for x in t.loop(turns, [t.number(0)] * 4, some)]
        found = [t.rsqrt(x * (1 / shape.hidden) + shape.eps) for x in sums]
        rest = [x * t.reciprocal(y) for x, y in zip(found, before, strict=True)]
        following = [times(x, format.scale) for x in found]

        def keep() -> None:
            t.store_shared(scales + text * 4, rest)
            t.store_shared(scales + (text + MOST_ROWS) * 4, following)

        t.when(own.equals(0), keep)
        t.arrive(WITH_SCALERS, SCALED)
        return following

    t.loop(2 * shape.layers + 1, [t.number(1)] * 4, norm)
