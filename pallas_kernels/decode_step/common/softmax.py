"""A running softmax over slots of a cache, spread over the lanes of a warp, then over warps.

Scores are K q^T and results V^T P^T, with the heads of a group in the eight columns of a product on
the tensor cores: as rows they would fill half of it. Lane 4 g + t has heads 2 t and 2 t + 1.
"""

import dataclasses
import functools

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import Format
from pallas_kernels.decode_step.ptx.thread import V

NEVER = -1e30
"""The score of a slot that isn't there: far below every other, so that it weighs nothing."""

ACROSS = (4, 8, 16)
"""What the numbers of lanes with the same heads differ in."""


def score_scale(head_dim: int) -> float:
    """What a query times a key is multiplied with, for exponentials of base two."""
    return t.LOG2_E * head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class Softmax:
    """A lane's share of a running softmax.

    Attributes:
        maximum: of each of its two heads.
        total: of each, over the lane's slots alone.
        values: for every 64 columns, of columns 8 g to 8 g + 7 the first head's and the second's.
    """

    maximum: list[V]
    total: list[V]
    values: list[V]

    @classmethod
    def empty(cls, head_dim: int) -> "Softmax":
        zero = t.number(0)
        return cls([t.number(NEVER)] * 2, [zero] * 2, [zero] * (head_dim // 4))

    def carry(self) -> list[V]:
        return [*self.maximum, *self.total, *self.values]

    @classmethod
    def carried(cls, carry: list[V]) -> "Softmax":
        return cls(carry[:2], carry[2:4], carry[4:])

    def over(
        self,
        format: Format,
        queries: list[list[V]],
        keys: list[list[list[V]]],
        values: list[list[list[V]]],
        there: list[V],
    ) -> "Softmax":
        """With 16 more slots, of which one at least is attended to.

        Args:
            format: of queries, keys, values and weights.
            queries: of head g, four words for every 32 columns: 8 t to 8 t + 7.
            keys: of slots g and g + 8, the same columns.
            values: of slots 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, four words for every 64 columns:
                8 g to 8 g + 7.
            there: whether to attend to slots g and g + 8. Values of the others are finite.
        """
        head_dim = 4 * len(self.values)
        # Two sums, so that half as many products wait for each other.
        parts = [[t.number(0)] * 4] * 2
        for query, *both in zip(queries, *keys, strict=True):
            for n in range(2):
                a = [key[i] for i in (2 * n, 2 * n + 1) for key in both]
                parts[n] = format.multiply(a, query[2 * n : 2 * n + 2], parts[n])
        sums = [x + y for x, y in zip(*parts, strict=True)]
        scores = [
            [t.select(c, s * score_scale(head_dim), NEVER) for s in sums[2 * n : 2 * n + 2]]
            for n, c in enumerate(there)
        ]
        maximum = [t.larger(*of_head) for of_head in zip(*scores, strict=True)]
        for mask in ACROSS:
            maximum = [t.larger(m, t.from_lane(m, mask)) for m in maximum]
        maximum = [t.larger(m, mine) for m, mine in zip(maximum, self.maximum, strict=True)]
        shrink = [t.exp2(mine - m) for m, mine in zip(maximum, self.maximum, strict=True)]
        total = [mine * less for mine, less in zip(self.total, shrink, strict=True)]
        weights = []
        for pair in scores:
            each = [t.exp2(s - m) for s, m in zip(pair, maximum, strict=True)]
            total = [x + e for x, e in zip(total, each, strict=True)]
            weights.append(t.transposed(format.pair(*each)))
        out = [value * shrink[n % 2] for n, value in enumerate(self.values)]
        for i, (first, second, *later) in enumerate(zip(*values, strict=True)):
            for j in range(4):
                a = [
                    t.halves(low[j], high[j], half)
                    for low, high in ((first, second), later)
                    for half in range(2)
                ]
                at = 4 * (4 * i + j)
                out[at : at + 4] = format.multiply(a, weights, out[at : at + 4])
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
        lane, warp = t.thread_id() % t.WARP, t.thread_id() // t.WARP
        eighth, two = lane // 4, lane % 4 * 2
        totals = [t.warp_sum(total, ACROSS) for total in found.total]

        def store(n: int) -> None:
            for i in range(0, len(found.values), 8):
                at = self.value(warp, two + n, eighth * 8 + (i // 16 * 64 + i % 16 // 2))
                t.store_shared(at, found.values[i + n : i + 8 : 2])
            at = self.stats(warp, two + n)
            t.when(eighth.equals(0), lambda: t.store_shared(at, [found.maximum[n], totals[n]]))

        for n in range(2):
            t.when(two + n < self.heads, functools.partial(store, n))

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
