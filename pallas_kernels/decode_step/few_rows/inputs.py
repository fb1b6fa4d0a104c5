"""A product's whole input in shared memory, as the tensor cores take it.

An input is float32; it enters as two 16-bit numbers, rounded and the rest. Of every 16 columns each
row has four quads, four rounded numbers and their four rests. Where weights have addends, means of
every 16 inputs are kept as well: of a tile and row eight rounded means, then their rests. The sums
of inputs that float16 still holds would overflow it.
"""

import functools
import itertools
from collections.abc import Sequence

from pallas_kernels.decode_step.common.exchange import poll
from pallas_kernels.decode_step.common.launch import THREADS
from pallas_kernels.decode_step.packed.plan import StepPlan
from pallas_kernels.decode_step.packed.scales import AVERAGED
from pallas_kernels.decode_step.packed.tile import WARPS
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import Format
from pallas_kernels.decode_step.ptx.thread import V

QUAD = 4
"""Numbers of an input that a lane takes at once: its operand of one product."""
AT_ONCE = 8
"""Quads that a lane polls for together."""
EIGHT = 8
"""Rows that a tensor-core product takes at most: it has eight columns."""


def operand_bytes(tiles: int, rows: int) -> int:
    """Shared memory for the operands of so many tiles' columns."""
    return tiles * WARPS * rows * 64


def input_bytes(plan: StepPlan, rows: int) -> int:
    """Shared memory for a product's input: its operands, then its means if any takes them."""
    tiles = max(phase.longest for phase in plan.phases)
    adds = any(storage.addends for storage in plan.storages)
    return operand_bytes(tiles, rows) + (tiles * rows * 32 if adds else 0)


class Inputs:
    """Where a block keeps one product's input after the other.

    Attributes:
        rows: 1 to 16.
        memory: in shared memory, for the operands.
        means: the same, for means of 16 inputs.
        squares: the same, for the warps' sums of squares.
        narrow: a row's rounded numbers and their rests are two of a product's columns; where not,
            they are one column of two products.
        eights: how many times eight rows there are, rounded up.
    """

    def __init__(self, rows: int, longest: int, memory: V, squares: V):
        self.rows, self.memory, self.squares = rows, memory, squares
        self.means = memory + operand_bytes(longest, rows)
        self.warps_each = max(1, WARPS // rows)
        self.narrow = rows <= 4
        self.eights = -(-rows // EIGHT)

    def absorb(
        self,
        source: V,
        stride: int,
        quads: int | V,
        most_quads: int,
        flag: V,
        format: Format,
        averaged: bool,
        norm: V | None = None,
    ) -> None:
        """Polls for an input and puts it into shared memory.

        Args:
            source: address of the first row's words.
            stride: words from a row to the next.
            quads: a quarter of the input's length, `most_quads` of them on any block.
            flag: of the words.
            format: in which the product is taken.
            averaged: whether means are kept.
            norm: address of weights to multiply with; the sum of squares of what they are
                multiplied with is kept as well.
        """
        warp, lane = t.thread_id() // t.WARP, t.thread_id() % t.WARP
        turn = warp % self.warps_each
        stripe = t.WARP * self.warps_each
        at_once = min(AT_ONCE, -(-most_quads // stripe))

        def some(row: V, i: V, squares: list[V]) -> list[V]:
            first = (i * at_once * self.warps_each + turn) * t.WARP + lane
            wanted = [first + n * stripe for n in range(at_once)]
            there = [q < quads for q in wanted]
            begin = source + (row * (4 * stride)).wide()
            weights = []
            if norm:
                weights = [
                    t.load_global(norm + (q << 4).wide(), 4, where=inside)
                    for q, inside in zip(wanted, there, strict=True)
                ]
            words = poll([begin + (q << 4).wide() for q in wanted], 4, flag, there)
            (total,) = squares
            for n, (q, values) in enumerate(zip(wanted, words, strict=True)):
                if norm:
                    total = sum((v * v for v in values), start=total)
                    values = [v * w.bits() for v, w in zip(values, weights[n], strict=True)]
                pairs = [format.split(*values[:2]), format.split(*values[2:])]
                operand = [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]]
                at = (q // QUAD) * (64 * self.rows) + row * 64 + (q % QUAD) * 16
                target = self.memory + at
                t.when(there[n], functools.partial(t.store_shared, target, operand))
                if averaged:
                    self._average(row, q, values, format, there[n])
            return [total]

        def all_of(row: V) -> None:
            turns = (t.integer(quads) + (stripe * at_once - 1)) // (stripe * at_once)
            (squares,) = t.loop(turns, [t.number(0)], functools.partial(some, row))
            if norm:
                total = t.warp_sum(squares)
                at = self.squares + (row * self.warps_each + turn) * 4
                t.when(lane.equals(0), lambda: t.store_shared(at, [total]))

        def every(i: V, _: list[V]) -> list[V]:
            row = i * WARPS + warp // self.warps_each
            t.when(row < self.rows, lambda: all_of(row))
            return []

        # One thread looks out for the first word. If all of them did, in every block, they would
        # slow down what they wait for.
        t.when(t.thread_id().equals(0), lambda: poll([source], 1, flag))
        t.block_barrier(THREADS)
        t.loop(-(-self.rows // WARPS), [], every)
        t.block_barrier(THREADS)

    def _average(self, row: V, quad: V, values: list[V], format: Format, there: V) -> None:
        """Over four quads, which are 16 inputs: of each eight, one lane keeps both means."""
        mine = t.warp_sum(sum(values[1:], start=values[0]), masks=(1, 2)) * (1 / AVERAGED)
        rounded, rest = format.split(mine, t.from_lane(mine, 4))
        at = self.means + ((quad // 32) * self.rows + row) * 32 + quad % 32 // 8 * 4

        def both() -> None:
            t.store_shared(at, [rounded])
            t.store_shared(at + 16, [rest])

        t.when(there & (quad % 8).equals(0), both)

    def mean_square(self, row: V, length: int) -> V:
        """Of the input absorbed with weights."""
        at = self.squares + row * (4 * self.warps_each)
        each = [t.load_shared_floats(at + 4 * i)[0] for i in range(self.warps_each)]
        return sum(each[1:], start=each[0]) * (1 / length)

    def operands(self, sixteen: V, lane: V, there: V | None = None) -> list[V]:
        """This lane's operands of 16 inputs: one product's, or two for every eight rows.

        A column of a product that is no row's has another row's numbers; nobody asks for its sums.
        """
        column, quarter = lane // 4, lane % 4
        at, loaded = sixteen * (64 * self.rows) + self.memory, []
        for first in range(0, self.rows, EIGHT):
            last = min(self.rows - first, EIGHT) - 1
            if self.narrow:
                words, own = 2, t.smaller(column // 2, last) * 64 + column % 2 * 8
            else:
                words, own = 4, (column if last == EIGHT - 1 else t.smaller(column, last)) * 64
            loaded += t.load_shared(at + (own + quarter * 16 + first * 64), words, there)
        return loaded

    def averages(self, tile: V, lane: V, there: Sequence[V]) -> list[V]:
        """This lane's operands of two tiles' means, if they are there, as `operands` has them."""
        column, quarter = lane // 4, lane % 4
        at, loaded = tile * (32 * self.rows) + self.means + quarter * 4, []
        for first in range(0, self.rows, EIGHT):
            last = min(self.rows - first, EIGHT) - 1
            own, parts = t.smaller(column, last) * 32 + first * 32, [0, 16]
            if self.narrow:
                own, parts = t.smaller(column // 2, last) * 32 + column % 2 * 16, [0]
            for part, (n, each) in itertools.product(parts, enumerate(there)):
                loaded += t.load_shared(at + own + (part + n * 32 * self.rows), 1, each)
        return loaded
