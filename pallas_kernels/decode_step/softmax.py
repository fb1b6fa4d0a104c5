"""A running softmax over slots of a cache, spread over the lanes of a warp, then over warps.

Scores are q K^T with the heads of a group as rows, so that a lane's share of them is already its
operand of the product with V. Lane 4 g + t has head g.
"""

import dataclasses

from pallas_kernels.decode_step import thread as t
from pallas_kernels.decode_step.formats import Format
from pallas_kernels.decode_step.thread import V

NEVER = -1e30
"""The score of a slot that isn't there."""


def score_scale(head_dim: int) -> float:
    """What a query times a key is multiplied with, for exponentials of base two."""
    return t.LOG2_E * head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A lane's share of a running softmax.

    `values` holds pairs of columns, for 64 columns at a time: 16 t + j and 16 t + 8 + j.
    """

    maximum: V
    total: V
    values: list[V]

    @classmethod
    def empty(cls, head_dim: int) -> "Softmax":
        return cls(t.number(NEVER), t.number(0), [t.number(0)] * (head_dim // 4))

    def carry(self) -> list[V]:
        return [self.maximum, self.total, *self.values]

    @classmethod
    def carried(cls, carry: list[V]) -> "Softmax":
        return cls(carry[0], carry[1], carry[2:])

    def over(
        self,
        format: Format,
        queries: list[list[V]],
        keys: list[list[list[V]]],
        values: list[list[list[list[V]]]],
        there: list[list[V]],
    ) -> "Softmax":
        """With some more slots, a multiple of 16, eight at a time.

        Args:
            format: of queries, keys, values and weights.
            queries: the lane's operands, four words for every 32 columns: 8 t to 8 t + 7.
            keys: of every eight slots, the same columns of slot g's key.
            values: of every eight slots, of slots 2 t and 2 t + 1, for every 64 columns the
                value's columns 8 g to 8 g + 7.
            there: of every eight slots, whether to attend to slots 2 t and 2 t + 1.
        """
        head_dim = 4 * len(self.values)
        zero, none = t.number(0), t.integer(0)
        scores = []
        for eight, both in zip(keys, there, strict=True):
            sums = [zero, zero]
            for query, key in zip(queries, eight, strict=True):
                for i in (0, 2):
                    a = [query[i], none, query[i + 1], none]
                    sums = format.multiply(a, key[i : i + 2], [*sums, zero, zero])[:2]
            scaled = [s * score_scale(head_dim) for s in sums]
            scores.append([t.select(c, s, NEVER) for c, s in zip(both, scaled, strict=True)])
        maximum = self.maximum
        for score in (s for pair in scores for s in pair):
            maximum = t.larger(maximum, score)
        for mask in (1, 2):
            maximum = t.larger(maximum, t.from_lane(maximum, mask))
        shrink = t.exp2(self.maximum - maximum)
        total, weights = self.total * shrink, []
        for both, pair in zip(there, scores, strict=True):
            # Where no slot was there so far, the maximum is no score either.
            each = [t.select(c, t.exp2(s - maximum), 0.0) for c, s in zip(both, pair, strict=True)]
            total = total + each[0] + each[1]
            weights.append(format.pair(*each))
        out = [value * shrink for value in self.values]
        for n in range(0, len(keys), 2):
            a = [weights[n], none, weights[n + 1], none]
            for i in range(head_dim // 64):
                rows = [slot[i] for eight in values[n : n + 2] for slot in eight]
                for j in range(8):
                    b = [t.halves(rows[m][j // 2], rows[m + 1][j // 2], j % 2) for m in (0, 2)]
                    at = 2 * (8 * i + j)
                    out[at : at + 2] = format.multiply(a, b, [*out[at : at + 2], zero, zero])[:2]
        return Softmax(maximum, total, out)


@dataclasses.dataclass(frozen=True)
class Found:
    """What the warps of a block found for `heads` heads, in shared memory, in so many parts."""

    memory: V
    heads: int
    head_dim: int
    parts: int

    @staticmethod
    def size(heads: int, head_dim: int, parts: int) -> int:
        """Bytes."""
        return parts * heads * (head_dim + 2) * 4

    def value(self, part: int | V, head: V, column: int | V) -> V:
        """The address of a number."""
        return self.memory + ((head + part * self.heads) * self.head_dim + column) * 4

    def stats(self, part: int | V, head: V) -> V:
        """The address of a maximum and the sum after it."""
        values = self.parts * self.heads * self.head_dim * 4
        return self.memory + values + (head + part * self.heads) * 8

    def keep(self, found: Softmax) -> None:
        """Leaves what this warp found."""
        lane, warp = t.me() % t.WARP, t.me() // t.WARP
        head, quarter = lane // 4, lane % 4
        total = t.warp_sum(found.total, (1, 2))

        def store() -> None:
            for i in range(0, len(found.values), 16):
                for side in range(2):
                    column = found.values[i + side : i + 16 : 2]
                    at = self.value(warp, head, quarter * 16 + (4 * i + 8 * side))
                    for j in (0, 4):
                        t.store_shared(at + 4 * j, column[j : j + 4])
            at = self.stats(warp, head)
            t.when(quarter.equals(0), lambda: t.store_shared(at, [found.maximum, total]))

        t.when(head < self.heads, store)

    def merged(self, head: V, column: V, count: int) -> tuple[V, V, list[V]]:
        """Maximum, sum and values of `count` columns, over the parts."""
        stats = [t.load_shared_floats(self.stats(n, head), 2) for n in range(self.parts)]
        parts = [
            t.load_shared_floats(self.value(n, head, column), count) for n in range(self.parts)
        ]
        maximum = stats[0][0]
        for theirs, _ in stats[1:]:
            maximum = t.larger(maximum, theirs)
        total, values = t.number(0), [t.number(0)] * count
        for (theirs, weight), part in zip(stats, parts, strict=True):
            shrink = t.exp2(theirs - maximum)
            total = total + weight * shrink
            values = [v + p * shrink for v, p in zip(values, part, strict=True)]
        return maximum, total, values
