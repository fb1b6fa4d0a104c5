"""A matrix product of few rows: M-tile after M-tile, with the whole input in shared memory.

The warps of a block share each M-tile: of every 128 columns a warp has 16. Weights are the first
operand of the tensor-core product, eight rows at a time the second.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

from pallas_kernels.decode_step.common.launch import THREADS
from pallas_kernels.decode_step.common.phases import Epilogue, Prepare
from pallas_kernels.decode_step.common.ring import RingState
from pallas_kernels.decode_step.few_rows.inputs import EIGHT, Inputs
from pallas_kernels.decode_step.few_rows.stages import Stages
from pallas_kernels.decode_step.few_rows.weight_ring import WeightRing
from pallas_kernels.decode_step.packed.plan import Phase
from pallas_kernels.decode_step.packed.storage import Group, Storage
from pallas_kernels.decode_step.packed.tile import M_TILE, WARPS
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.arithmetic import multiply_add
from pallas_kernels.decode_step.ptx.formats import Format, times
from pallas_kernels.decode_step.ptx.thread import V

SUMS = 16
"""A lane's running sums: four for each of four products that needn't wait for each other."""

MOST_KEPT = 8
"""Tiles up to which an input is kept in registers for all M-tiles."""


Taken = tuple[list[V], list[list[V]]]
"""A lane's words of some weights, and its operands of their inputs, for each product in turn."""


def sums_bytes(m_tiles: int, rows: int) -> int:
    """Shared memory for the warps' sums of so many M-tiles, twice."""
    return 2 * m_tiles * WARPS * rows * M_TILE * 4


def _added(format: Format, group: Group, b: list[list[V]], sums: list[V]) -> list[V]:
    """The sums with a group's products added, under their scale."""
    if group.scales is None:
        return _chained(format, group.operands, b, sums)
    zeroes = [t.number(0)] * 4
    products = _chained(format, group.operands, b, zeroes)
    return [multiply_add(*three) for three in zip(products, group.scales, sums, strict=True)]


def _chained(format: Format, a: list[list[V]], b: list[list[V]], sums: list[V]) -> list[V]:
    for left, right in zip(a, b, strict=True):
        sums = format.multiply(left, right, sums)
    return sums


class Thread:
    """A thread of those that share M-tiles, and what its warp takes of each `spread` tiles.

    Which one it is, is asked for anew each time where weights are numbers: else addresses would
    fill the registers, of which many rows leave none. Blocks need more instructions than registers.
    """

    def __init__(self, spread: int):
        self.spread, self._number = spread, None if spread == 1 else t.thread_id()

    @property
    def number(self) -> V:
        return t.thread_id() if self._number is None else self._number

    @property
    def warp(self) -> V:
        return self.number // t.WARP

    @property
    def lane(self) -> V:
        return self.number % t.WARP

    @property
    def tile(self) -> int | V:
        return 0 if self.spread == 1 else self.warp * self.spread // WARPS

    def has(self, first: int | V, end: int | V) -> V | None:
        """Whether its tile, of `spread` from the first on, is before the end; None where it is in
        any case.
        """
        if isinstance(first, int) and isinstance(end, int) and first + self.spread <= end:
            return None
        return t.integer(first) + self.tile < end


class Products:
    """What the products of a block share.

    Attributes:
        inputs: of the products.
        weights: of the block.
        sums: shared memory for the warps' sums, twice.
        most_m_tiles: M-tiles whose sums are added up together.
    """

    def __init__(self, inputs: Inputs, weights: WeightRing, sums: V, most_m_tiles: int):
        self.inputs, self.weights, self.sums = inputs, weights, sums
        self.most_m_tiles, self.rows = most_m_tiles, inputs.rows

    @property
    def cut(self) -> Sequence[Stages]:
        """How each phase's M-tiles are."""
        return self.weights.cut

    def product(
        self,
        state: RingState,
        phase: Phase,
        stages: Stages,
        m_tiles: V,
        tiles: int | V,
        epilogue: Epilogue,
        prepare: Prepare,
        height: int,
        kind: Callable[[V], V] | None,
    ) -> RingState:
        """Multiplies a block's M-tiles with the input.

        A thread has one number of each group of M-tiles: of the block's `m_tile` the output `out`
        of `height`, of one row.

        Args:
            epilogue: called by each such thread.
            prepare: called before the M-tiles are multiplied, so that its loads take no time.
            kind: `Work.kind`.
        """

        def mine() -> tuple[V, V, V]:
            """M-tile of a group, row and output; worked out anew rather than kept meanwhile."""
            out, rest = t.thread_id() % height, t.thread_id() // height
            return rest // self.rows, rest % self.rows, out

        def group(i: V, carry: list[V]) -> list[V]:
            first = i * self.most_m_tiles
            count = t.smaller(m_tiles - first, self.most_m_tiles)
            sums = self.sums + (i & 1) * (sums_bytes(self.most_m_tiles, self.rows) // 2)
            number, _, out = mine()
            ready = prepare(first + number, out, number < count)

            def m_tile(n: V, carry: list[V]) -> list[V]:
                def stored(storage: Storage) -> list[V]:
                    at, thread = RingState(*carry), threads[storage.spread]
                    if inputs := kept.get(storage.spread):
                        how = (phase, stages, storage, thread, n, sums, inputs)
                        return [*self._short_m_tile(at, *how)]
                    return [*self._m_tile(at, phase, stages, storage, thread, tiles, n, sums)]

                if kind is None:
                    return stored(phase.storages[0])
                mine = kind(first + n)
                for which, storage in enumerate(phase.storages):
                    each = functools.partial(stored, storage)
                    carry = t.either(mine.equals(which), each, carry)
                return carry

            carry = t.loop(count, carry, m_tile)
            t.block_barrier(THREADS)
            number, row, out = mine()

            def total(below: int) -> list[V]:
                at = out + below if below else out
                return [times(self._total(sums, number, row, at), 1 / phase.format.scale)]

            t.when(number < count, lambda: epilogue(first + number, row, out, total, ready))
            return carry

        threads = {storage.spread: Thread(storage.spread) for storage in phase.storages}
        kept = {}
        if isinstance(tiles, int) and tiles <= MOST_KEPT:
            for spread, thread in threads.items():
                kept[spread] = [
                    self._inputs(t.integer(at), thread, thread.has(at, tiles))
                    for at in range(0, tiles, spread)
                ]
        groups = (m_tiles + (self.most_m_tiles - 1)) // self.most_m_tiles
        return RingState(*t.loop(groups, [*state], group))

    def _inputs(self, tile: V, thread: Thread, there: V | None) -> list[list[V]]:
        """This lane's operands of what its warp takes of `spread` tiles."""
        first = tile * WARPS + thread.warp * thread.spread
        return [self.inputs.operands(first + n, thread.lane, there) for n in range(thread.spread)]

    def _weights(
        self, tiles: V, storage: Storage, thread: Thread, there: Sequence[V | None]
    ) -> list[list[V]]:
        """This lane's words of a stage's tiles, which begin there, `spread` at a time."""
        lane, warp = thread.lane, thread.warp
        size, spread = storage.tile_bytes, storage.spread
        own = thread.tile * size

        def load(n: int, each: V | None) -> list[V]:
            def read(at: V, count: int) -> list[V]:
                return t.load_shared(tiles + (at + own) + n * spread * size, count, each)

            return storage.load(read, warp, lane)

        return [load(n, each) for n, each in enumerate(there)]

    def _addends(
        self, tiles: V, storage: Storage, thread: Thread, begin: int | V, end: int | V, count: int
    ) -> list[Taken]:
        """Of the addends of a stage's tiles, which are `begin` to `end` of an M-tile and `count` at
        most, what this warp takes: those of every eighth two tiles.
        """
        if not storage.addends:
            return []
        found = []
        for first in range(0, count, 2 * WARPS):
            at = thread.warp * 2 + first
            there = [at + (begin + n) < end for n in (0, 1)]

            def read(n: int, byte: V, words: int, at: V = at, there: list[V] = there) -> list[V]:
                address = tiles + at * storage.tile_bytes + byte + n * storage.tile_bytes
                return t.load_shared(address, words, there[n])

            reads = [functools.partial(read, n) for n in (0, 1)]
            words = storage.load_addends(reads, thread.lane)
            found.append((words, [self.inputs.averages(at + begin, thread.lane, there)]))
        return found

    def _multiplied(
        self,
        phase: Phase,
        storage: Storage,
        totals: Sequence[V],
        weights: Sequence[Taken],
        addends: Sequence[Taken],
    ) -> list[V]:
        """Running sums with some tiles added; of every eight rows in turn, a share of them."""
        totals, each = list(totals), SUMS // self.inputs.eights
        turns = [itertools.cycle(range(i, i + each, 4)) for i in range(0, SUMS, each)]
        parts: list[tuple[Group, list[list[V]]]] = []
        for words, taken in weights:
            rest = iter(taken)
            for group in storage.groups(words):
                parts.append((group, list(itertools.islice(rest, len(group.operands)))))
        parts += [(storage.addend_group(words), taken) for words, taken in addends]
        for group, x in parts:
            for half in range(0, len(x[0]), 2):
                at = next(turns[half // 4])
                b, sums = [each[half : half + 2] for each in x], totals[at : at + 4]
                totals[at : at + 4] = _added(phase.format, group, b, sums)
        return totals

    def _m_tile(
        self,
        state: RingState,
        phase: Phase,
        stages: Stages,
        storage: Storage,
        thread: Thread,
        tiles: int | V,
        number: V,
        sums: V,
    ) -> RingState:
        """Multiplies one M-tile with the input, stage by stage."""
        even = isinstance(tiles, int) and tiles % (stages.number * stages.unit) == 0
        count, spread = stages.tiles, storage.spread
        # Stages differ by a unit, and the last one may end within one.
        least = count if even else count - (2 * stages.unit - 1)

        def stage(i: V, carry: list[V]) -> list[V]:
            state, totals = RingState(*carry[:2]), carry[2:]
            begin, end = (stages.begin(tiles, i + n) for n in (0, 1))
            firsts = range(0, count, spread)
            there = [None if n + spread <= least else thread.has(begin + n, end) for n in firsts]
            filled = self.weights.wait(state)
            weights = self._weights(filled, storage, thread, there)
            addends = self._addends(filled, storage, thread, begin, end, count)
            inputs = [
                self._inputs(begin + n, thread, c) for n, c in zip(firsts, there, strict=True)
            ]
            taken = list(zip(weights, inputs, strict=True))
            totals = self._multiplied(phase, storage, totals, taken, addends)
            self.weights.release(state)
            return [*self.weights.next(state), *totals]

        carry = [*state, *[t.number(0)] * SUMS]
        after = t.loop(stages.number, carry, stage)
        self._store(phase.format, storage, after[2:], number, sums)
        return RingState(*after[:2])

    def _short_m_tile(
        self,
        state: RingState,
        phase: Phase,
        stages: Stages,
        storage: Storage,
        thread: Thread,
        number: V,
        sums: V,
        inputs: list[list[list[V]]],
    ) -> RingState:
        """The same with an input in registers, all stages at once."""
        spread = storage.spread
        weights: list[list[V]] = []
        addends: list[Taken] = []
        for i in range(stages.number):
            begin, end = (stages.begin(phase.across, n) for n in (i, i + 1))
            there = [thread.has(at, end) for at in range(begin, end, spread)]
            filled = self.weights.wait(state)
            weights += self._weights(filled, storage, thread, there)
            addends += self._addends(filled, storage, thread, begin, end, end - begin)
            self.weights.release(state)
            state = self.weights.next(state)
        taken = list(zip(weights, inputs, strict=True))
        totals = self._multiplied(phase, storage, [t.number(0)] * SUMS, taken, addends)
        self._store(phase.format, storage, totals, number, sums)
        return state

    def _store(
        self, format: Format, storage: Storage, totals: Sequence[V], number: V, sums: V
    ) -> None:
        """Keeps this warp's sums of an M-tile for `_total`."""
        lane, warp = t.thread_id() % t.WARP, t.thread_id() // t.WARP
        out, quarter = lane // 4, lane % 4
        each, rest = SUMS // self.inputs.eights, 1 / format.rest
        if not self.inputs.narrow:
            # Of an eight's products every second was one of rests.
            totals = [times(x, rest if i // 4 % 2 else 1) for i, x in enumerate(totals)]
        found = [
            [sum(totals[n + i + 4 : n + each : 4], start=totals[n + i]) for i in range(4)]
            for n in range(0, SUMS, each)
        ]
        # Of each four numbers two are of output g, two of output g + 8.
        wholes = [1 / unit for unit in storage.units for _ in range(2)]
        found = [[times(x, w) for x, w in zip(four, wholes, strict=True)] for four in found]
        base = sums + (number * WARPS + warp) * (self.rows * M_TILE * 4)

        def store(row: V, low: V, high: V) -> None:
            """The row's sums of the M-tile's outputs g and g + 8."""
            at = base + (row * M_TILE + out) * 4

            def both() -> None:
                t.store_shared(at, [low])
                t.store_shared(at + 32, [high])

            t.when(row < self.rows, both)

        if self.inputs.narrow:
            ((a, b, c, d),) = found
            store(quarter, a + times(b, rest), c + times(d, rest))
            return
        for first, (a, b, c, d) in zip(range(0, self.rows, EIGHT), found, strict=True):
            store(quarter * 2 + first, a, c)
            store(quarter * 2 + (first + 1), b, d)

    def _total(self, sums: V, m_tile: V, row: V, out: V) -> V:
        """One number of an M-tile: the sum over the warps."""
        at = sums + ((m_tile * (WARPS * self.rows) + row) * M_TILE + out) * 4
        parts = [t.load_shared_floats(at + w * (self.rows * M_TILE * 4))[0] for w in range(WARPS)]
        return sum(parts[1:], start=parts[0])
