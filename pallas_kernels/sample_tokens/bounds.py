"""The best token of a row, and a bound above which lie a few more tokens than are wanted."""

import dataclasses

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.sample_tokens import instructions as i
from pallas_kernels.sample_tokens.meeting import Meeting, better
from pallas_kernels.sample_tokens.scores import (
    LOWEST,
    NOTHING,
    THREADS,
    UNROLL,
    Scores,
    order,
    ordered,
)

SHARE = THREADS // t.WARP
"""Of the threads' bests, a lane's."""
BOUND_BITS = 16
"""More: fewer tokens above the bound; fewer: a shorter search for it."""
SIGN = -(1 << 31)


@dataclasses.dataclass(frozen=True)
class Bests:
    """Shared memory for the best score of every thread."""

    base: V

    BYTES = 4 * THREADS

    def find(self, scores: Scores, meeting: Meeting, slot: V, bounded: V, m: V) -> list[V]:
        """The best score and its first id; the model's largest logit, or NaN; the bound.

        Args:
            slot: of the meeting.
            bounded: whether a bound is wanted: a condition.
            m: how many tokens shall lie above it at least.
        """
        nothing, infinite = t.number(NOTHING), t.number(float("inf"))

        def visit(token: V, quad: list[V], own: list[V], carry: list[V]) -> list[V]:
            best, where, largest = carry
            for n, score in enumerate(quad):
                wins = score > best
                best, where = t.select(wins, score, best), t.select(wins, token + n, where)
                largest = t.larger(largest, own[n])
            return [best, where, largest]

        best, where, largest = scores.walk([nothing, t.integer(0), nothing], visit, UNROLL)

        def bound() -> list[V]:
            t.store_shared(self.base + (t.thread_id() << 2), [best])
            t.block_barrier(THREADS)
            share = (m + (scores.blocks - 1)) // scores.blocks
            return t.either(t.thread_id() < t.WARP, lambda: [self._bound(share)], [infinite])

        (limit,) = t.either(bounded, bound, [infinite])

        def combine(a: list[V], b: list[V]) -> list[V]:
            return [*better(a[:2], b[:2]), t.larger(a[2], b[2]), t.smaller(a[3], b[3])]

        return meeting.of(slot, [best, where, largest, limit], combine)

    def _bound(self, m: V) -> V:
        """At most the m-th largest of the threads' bests, by one warp."""
        at = self.base + ((t.thread_id() & 31) << 4)
        mine = [
            order(score)
            for n in range(0, SHARE, 4)
            for score in t.load_shared_floats(at + n * (4 * t.WARP), 4)
        ]

        def turn(step: V, found: list[V]) -> list[V]:
            higher = found[0] | (t.integer(SIGN) >> step)
            counts = [t.select(score >= (higher ^ SIGN), t.integer(1), 0) for score in mine]
            # In pairs, so that few additions wait for each other.
            while len(counts) > 1:
                counts = [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)]
            (count,) = counts
            return [t.select(i.counted(count) >= m, higher, found[0])]

        (found,) = t.loop(BOUND_BITS, [t.integer(0)], turn)
        return ordered(t.larger(found ^ SIGN, LOWEST))
