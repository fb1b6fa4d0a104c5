"""A matrix product of many rows: M-tiles side by side, some columns of all of them at a time.

An input of so many rows doesn't fit in shared memory, so it streams through it as the weights
do: once for all M-tiles of a block, as far as registers have room for their sums. The warps divide
the M-tiles; or two, of two warpgroups, share one and each takes half of the columns.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from pallas_kernels.decode_step.common.launch import THREADS
from pallas_kernels.decode_step.common.phases import Total
from pallas_kernels.decode_step.common.ring import Ring, RingState
from pallas_kernels.decode_step.many_rows.inputs import InputLayout
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
from pallas_kernels.decode_step.ptx import warpgroup
from pallas_kernels.decode_step.ptx.loops import block_stride_loop
from pallas_kernels.decode_step.ptx.thread import V

STRIDE = M_TILE + 4
"""Words from a row's sums to the next's, so that lanes store into different banks."""


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
            own = self._own(group, at_hand)
            stored = [kind(first + m_tile) for m_tile in own] if kind else []

            def stage(_: V, carry: list[V]) -> list[V]:
                states, sums = StreamStates.carried(carry[:5]), carry[5:]
                units = at_hand * group.units
                weights = self.weights.address(states.weights, units)
                self.weights.ring.wait(states.weights.of_ring)
                inputs = self.input_ring.wait(states.inputs)
                sums = self._multiplied(phase, group, stored, weights, own, inputs, sums)
                self.weights.ring.release(states.weights.of_ring)
                self.input_ring.release(states.inputs)
                following = self.weights.next(states.weights, units)
                return [*following, *self.input_ring.next(states.inputs), *sums]

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

    def _own(self, group: Group, at_hand: V) -> list[V]:
        """This warp's M-tiles; the last one at hand, where there are fewer, for no sums of its own:
        a warpgroup multiplies together.
        """
        across = WARPS // group.sharers
        of = t.thread_id() // t.WARP % across
        return [t.smaller(of + n * across, at_hand - 1) for n in range(group.each)]

    def _multiplied(
        self,
        phase: Phase,
        group: Group,
        stored: list[V],
        weights: V,
        own: list[V],
        inputs: V,
        sums: list[V],
    ) -> list[V]:
        """A lane's sums with a stage added: of its M-tiles in turn, of every eight rows.

        Args:
            stored: which of the phase's storages its M-tiles have; none where there is one.
        """
        share = t.thread_id() // t.WARPGROUP if group.sharers == 2 else t.integer(0)
        lane, sixteens = t.thread_id() % t.WARP, group.unit.sixteens
        inputs = inputs + share * (sixteens * self.inputs.fragment_bytes)
        begins = [weights + m_tile * (group.units * group.unit.bytes) for m_tile in own]
        pieces = range(0, group.pieces, group.sharers)

        def loaded(storage: Storage, piece: int) -> list[list[list[V]]]:
            """Of each M-tile the words of a piece; a unit's tile follows the one before."""
            unit, within = divmod(piece, PIECES)
            apart = unit * (storage.tile_bytes // group.unit.tile)
            words = []
            for begin in begins:

                def read(at: V, count: int, begin: V = begin) -> list[V]:
                    return t.load_shared(begin + at + apart, count)

                some = range(0, sixteens, storage.spread)
                numbers = [((share + within) * sixteens + n) // storage.spread for n in some]
                words.append([storage.load(read, number, lane) for number in numbers])
            return words

        def operands(storage: Storage, words: list[list[list[V]]]) -> list[V]:
            return [
                word
                for some in words
                for each in some
                for operand in storage.operands(each)
                for word in operand
            ]

        def all_pieces(sums: list[V], made: Callable[[int], list[V]]) -> list[V]:
            """Each piece is made while the products of the one before run."""
            running: list[V] = []
            for piece in pieces:
                a = made(piece)
                if running:
                    warpgroup.wait(running)
                warpgroup.fence()
                sums = self._products(group, a, inputs, piece, sums)
                warpgroup.commit()
                running = a
            warpgroup.wait(running)
            return sums

        def alike(storage: Storage) -> list[V]:
            later = [loaded(storage, pieces[0])]

            def made(piece: int) -> list[V]:
                words = later.pop()
                if piece != pieces[-1]:
                    later.append(loaded(storage, piece + group.sharers))
                return operands(storage, words)

            return all_pieces(sums, made)

        if len(phase.storages) == 1:
            return alike(phase.storages[0])
        after = sums
        if len(phase.begins) == 1:
            for n, storage in enumerate(phase.storages):
                each = functools.partial(alike, storage)
                after = t.either(stored[0].equals(n), each, after)
            return after

        def by_warp(piece: int) -> list[V]:
            made = [t.integer(0)] * (4 * sixteens)
            for n, storage in enumerate(phase.storages):

                def each(storage: Storage = storage) -> list[V]:
                    return operands(storage, loaded(storage, piece))

                made = t.either(stored[0].equals(n), each, made)
            return made

        return all_pieces(sums, by_warp)

    def _products(self, group: Group, a: list[V], inputs: V, piece: int, sums: list[V]) -> list[V]:
        """Sums with a piece's products added, of which `a` has each M-tile's operands in turn."""
        sixteens, size, made = group.unit.sixteens, len(sums) // group.each, list(sums)
        for n in range(group.each):
            for sixteen in range(sixteens):
                first = 4 * (n * sixteens + sixteen)
                at = (piece * sixteens + sixteen) * self.inputs.fragment_bytes
                mine = slice(n * size, (n + 1) * size)
                how = (self.inputs.format, a[first : first + 4], inputs + at, made[mine])
                made[mine] = warpgroup.multiply(*how)
        return made

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
            own = place * WARPS + of
            begin = (own * self.inputs.padded + row) * STRIDE + out

            def total(below: int) -> list[V]:
                found: list[V] = []
                for sharer in range(group.sharers):
                    at = begin + (sharer * across * self.inputs.padded * STRIDE + below)
                    part = t.load_shared_floats(self.sums + at * 4, 4)
                    found = [x + y for x, y in zip(found, part, strict=True)] if found else part
                return found

            t.when(m_tile < at_hand, lambda: finish(first + m_tile, row, out, total))

        block_stride_loop(min(across, group.m_tiles) * self.inputs.rows * quads, THREADS, item)
