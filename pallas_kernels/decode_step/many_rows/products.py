"""A matrix product of many rows: M-tiles side by side, some columns of all of them at a time.

An input of so many rows doesn't fit in shared memory, so it streams through it as the weights
do: once for all M-tiles of a block, as far as registers have room for their sums. The warps divide
the M-tiles; where there are few, several warps share one and each takes some of the columns.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from pallas_kernels.decode_step.common.launch import THREADS
from pallas_kernels.decode_step.common.phases import Total
from pallas_kernels.decode_step.common.ring import Ring, RingState
from pallas_kernels.decode_step.many_rows.inputs import PAIR_BYTES, InputLayout
from pallas_kernels.decode_step.many_rows.weight_ring import (
    PIECES,
    Group,
    WeightRing,
    WeightState,
)
from pallas_kernels.decode_step.packed.plan import Phase
from pallas_kernels.decode_step.packed.storage import Storage
from pallas_kernels.decode_step.packed.tile import M_TILE, WARPS
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.loops import block_stride_loop
from pallas_kernels.decode_step.ptx.thread import V

STRIDE = M_TILE + 4
"""Words from a row's sums to the next's, so that lanes store into different banks."""
AT_ONCE = 2
"""Times 16 columns whose operands are loaded while as many are multiplied."""


def sums_bytes(inputs: InputLayout) -> int:
    """Shared memory for the sums of some M-tiles of each warp."""
    return inputs.m_tiles_at_once * WARPS * inputs.padded * STRIDE * 4


Finish = Callable[[V, V, V, Total], None]


class StreamStates(NamedTuple):
    """Where a block stands in its two streams."""

    weights: WeightState
    inputs: RingState

    @classmethod
    def first(cls) -> "StreamStates":
        return cls(WeightState.first(), RingState.first())

    def carry(self) -> list[V]:
        return [*self.weights, *self.inputs]

    @classmethod
    def carried(cls, carry: list[V]) -> "StreamStates":
        return cls(WeightState(*carry[:3]), RingState(*carry[3:]))


class Products:
    """What the products of a block share.

    Attributes:
        inputs: their layout.
        weights: of the block.
        input_ring: through which the input streams.
        sums: shared memory for the sums of an M-tile of each warp.
    """

    def __init__(self, inputs: InputLayout, weights: WeightRing, input_ring: Ring, sums: V):
        self.inputs, self.weights, self.input_ring, self.sums = inputs, weights, input_ring, sums

    def product(
        self,
        states: StreamStates,
        phase: Phase,
        group: Group,
        m_tiles: V,
        tiles: int | V,
        finish: Finish,
        ready: Callable[[], None],
        height: int,
        kind: Callable[[V], V] | None,
    ) -> StreamStates:
        """Multiplies a block's M-tiles with the input.

        Args:
            tiles: in an M-tile.
            finish: called with the block's M-tile, a row, the first of four outputs, below
                `height`, and their sums.
            ready: waits for what `finish` needs besides; called once, without M-tiles too.
            kind: `Work.kind`; all M-tiles that a warp has at the same time are stored alike.
        """
        size = group.each * self.inputs.eights * 4  # of a lane's sums

        def turn(i: V, carry: list[V]) -> list[V]:
            at_hand, first = group.at_hand(m_tiles, i), i * group.m_tiles
            of = t.thread_id() // t.WARP // group.sharers
            stored = [kind(first + of)] if kind else []

            def stage(_: V, carry: list[V]) -> list[V]:
                states, sums = StreamStates.carried(carry[:5]), carry[5:]
                self.weights.ring.wait(states.weights.of_ring)
                some = self.input_ring.wait(states.inputs)

                units = at_hand * group.units
                weights = self.weights.address(states.weights, units)

                def multiplied() -> list[V]:
                    after = sums
                    for n, storage in enumerate(phase.storages):
                        how = (storage, group, weights, some, sums)
                        each = functools.partial(self._multiplied, *how)
                        after = t.either(stored[0].equals(n), each, after) if stored else each()
                    return after

                after = multiplied() if group.each > 1 else t.either(of < at_hand, multiplied, sums)
                self.weights.ring.release(states.weights.of_ring)
                self.input_ring.release(states.inputs)
                following = self.weights.next(states.weights, units)
                return [*following, *self.input_ring.next(states.inputs), *after]

            carry = t.loop(group.stages(tiles), [*carry, *[t.number(0)] * size], stage)
            sums = carry[5:]
            t.when(i.equals(0), ready)
            each, at_once = size // group.each, self.inputs.m_tiles_at_once
            for begin in range(0, group.each, at_once):
                some = range(begin, min(begin + at_once, group.each))
                for n in some:
                    self._store(sums[n * each : (n + 1) * each], n - begin)
                t.block_barrier(THREADS)
                for n in some:
                    self._finish(group, n, n - begin, first, at_hand, finish, height)
                t.block_barrier(THREADS)
            return carry[:5]

        after = t.loop(group.turns(m_tiles), states.carry(), turn)
        t.when(m_tiles.equals(0), ready)
        return StreamStates.carried(after)

    def _multiplied(
        self, storage: Storage, group: Group, weights: V, inputs: V, sums: list[V]
    ) -> list[V]:
        """A lane's sums with a stage added: of its M-tiles in turn, of every eight rows."""
        lane, warp = t.thread_id() % t.WARP, t.thread_id() // t.WARP
        of, share = warp // group.sharers, warp % group.sharers
        sixteens, each = group.unit.sixteens, self.inputs.fragment_bytes
        inputs = inputs + share * (sixteens * each) + lane * 16
        # Units of one M-tile follow each other; there is room for the largest.
        own_bytes = storage.tile_bytes // group.unit.tile
        m_tile_bytes = group.units * group.unit.bytes
        # A warp's first piece, in its unit; the others follow at distances that are constants.
        weights = weights + of * m_tile_bytes + share // PIECES * own_bytes
        own, pieces = share % PIECES, range(0, group.pieces, group.sharers)

        def operands(piece: int) -> tuple[list[list[list[V]]], list[list[list[V]]]]:
            x = [
                [
                    t.load_shared(inputs + ((piece * sixteens + n) * each + pair * PAIR_BYTES), 4)
                    for pair in range(self.inputs.pairs)
                ]
                for n in range(sixteens)
            ]
            loaded = []
            for n in range(group.each):
                apart = n * (WARPS // group.sharers) * m_tile_bytes + piece // PIECES * own_bytes

                def read(at: V, count: int, apart: int = apart) -> list[V]:
                    return t.load_shared(weights + at + apart, count)

                some = range(0, sixteens, storage.spread)
                numbers = [((own + piece % PIECES) * sixteens + n) // storage.spread for n in some]
                loaded.append([storage.load(read, number, lane) for number in numbers])
            return x, loaded

        at_once = max(1, AT_ONCE // sixteens)
        turns = [pieces[n : n + at_once] for n in range(0, len(pieces), at_once)]
        later = [operands(piece) for piece in turns[0]]
        sums = list(sums)
        for following in [*turns[1:], ()]:
            loaded, later = later, [operands(piece) for piece in following]
            for x, m_tile_words in loaded:
                for n, words in enumerate(m_tile_words):
                    made = [a for some in words for a in storage.operands(some)]
                    for a, pairs in zip(made, x, strict=True):
                        eights = [pair[half : half + 2] for pair in pairs for half in (0, 2)]
                        eights = eights[: self.inputs.eights]
                        for eight, b in enumerate(eights):
                            at = (n * len(eights) + eight) * 4
                            sums[at : at + 4] = self.inputs.format.multiply(a, b, sums[at : at + 4])
        return sums

    def _store(self, sums: list[V], place: int) -> None:
        """Keeps this warp's sums of one M-tile in one of the places for `_finish`."""
        lane, warp = t.thread_id() % t.WARP, t.thread_id() // t.WARP
        out, row = lane // 4, lane % 4 * 2
        own = place * WARPS + warp
        at = self.sums + ((own * self.inputs.padded + row) * STRIDE + out) * 4
        for eight in range(len(sums) // 4):
            for n, value in enumerate(sums[4 * eight : 4 * eight + 4]):
                # Outputs g and g + 8 of rows 2 t and 2 t + 1.
                offset = (eight * 8 + n % 2) * STRIDE + n // 2 * 8
                t.store_shared(at + offset * 4, [value])

    def _finish(
        self,
        group: Group,
        n: int,
        place: int,
        first: V,
        at_hand: V,
        finish: Finish,
        height: int,
    ) -> None:
        """Calls `finish` for the n-th M-tile of every warp, whose sums are in that place."""
        quads, across = height // 4, WARPS // group.sharers

        def item(number: V) -> None:
            out, rest = number % quads * 4, number // quads
            row, of = rest % self.inputs.rows, rest // self.inputs.rows
            m_tile = of + n * across
            own = place * WARPS + of * group.sharers
            begin = (own * self.inputs.padded + row) * STRIDE + out

            def total(below: int) -> list[V]:
                found: list[V] = []
                for sharer in range(group.sharers):
                    at = begin + (sharer * self.inputs.padded * STRIDE + below)
                    part = t.load_shared_floats(self.sums + at * 4, 4)
                    found = [x + y for x, y in zip(found, part, strict=True)] if found else part
                return found

            t.when(m_tile < at_hand, lambda: finish(first + m_tile, row, out, total))

        block_stride_loop(min(across, group.m_tiles) * self.inputs.rows * quads, THREADS, item)
