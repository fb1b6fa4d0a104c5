"""Where top-p ends among many tokens: how much they weigh by their scores, then the few that lie
where it ends.

Bins are of equal width in the score. A bin's sum counts a token by its weight over the largest that
the bin allows, in 2^-13, so that 32 bits hold all tokens and the place is found to 1e-4 of a bin's
weight. What is found is checked by exact sums; where it fails, or too many tokens share the bin,
the search decides (`search.py`).
"""

import dataclasses
import functools

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.loops import block_stride_loop
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.sample_tokens import instructions as i
from pallas_kernels.sample_tokens.meeting import (
    DRAWN,
    FOUND,
    SEARCHED,
    WARPS,
    Meeting,
    added,
    better,
)
from pallas_kernels.sample_tokens.pick import MOST, Candidates
from pallas_kernels.sample_tokens.round import Round
from pallas_kernels.sample_tokens.scores import NOTHING, THREADS, UNROLL

BINS = 4096
SHARE = BINS // THREADS
"""Bins of a thread."""
FINEST = 13
"""A bin counts in 2^-13."""
WIDEST = 32.0
"""Scores that lie farther below the highest weigh nothing."""


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Shared memory of every block for its bins, the first for the highest scores."""

    base: V
    meeting: Meeting
    candidates: Candidates

    BYTES = 4 * BINS

    def threshold(self, about: Round, total: V, lowest: V) -> list[V]:
        """Whether it was found (1), and down to which score and id top-p keeps tokens.

        Args:
            total: the weight of all tokens.
            lowest: the lowest score, over the temperature.
        """
        span = t.larger(t.smaller(about.hottest - lowest, WIDEST), 1e-6)
        width = span * (1 / BINS)
        leads, may_go = self.meeting.rank.equals(0), about.may_go(total)
        t.when(leads, self.candidates.clear)
        self._fill(about, width)
        bin = self._ends(leads, may_go, width)
        count, below, inside = self._collect(about, width, bin)
        found = (count <= MOST) & (below <= may_go) & (below + inside > may_go)
        nothing = [t.number(NOTHING), t.integer(0)]

        def tell() -> list[V]:
            unit = [t.number(NOTHING), t.integer(1 << 30)]
            first = t.either(leads, lambda: self._first(about, count, below, may_go), unit)
            return self.meeting.of(SEARCHED, first, better)

        return [t.select(found, t.integer(1), 0), *t.either(found, tell, nothing)]

    @staticmethod
    def _bin(about: Round, width: V, hot: V) -> tuple[V, V]:
        """A score's bin, and how far below the bin's highest it lies."""
        below = about.hottest - hot
        bin = t.smaller(i.to_integer(below * t.reciprocal(width)), BINS - 1)
        return bin, below - i.signed_number(bin) * width

    def _fill(self, about: Round, width: V) -> None:
        block_stride_loop(
            BINS, THREADS, lambda bin: t.store_shared(self.base + (bin << 2), [t.integer(0)])
        )
        t.block_barrier(THREADS)

        def visit(token: V, quad: list[V], _: list[V], carry: list[V]) -> list[V]:
            for hot in about.hot(quad):
                bin, rest = self._bin(about, width, hot)
                part = i.to_integer(t.exp2(rest * -t.LOG2_E) * 2.0**FINEST + 0.5)
                weighs = about.hottest - hot < WIDEST
                t.when(weighs, functools.partial(i.add_shared, self.base + (bin << 2), part))
            return carry

        about.scores.walk([], visit, UNROLL)
        i.cluster_barrier()

    def _ends(self, leads: V, may_go: V, width: V) -> V:
        """The bin in which as much lies below as may go."""
        none = t.integer(-1)
        mine = t.either(leads, lambda: [self._found(may_go, width)], [none])

        def larger(a: list[V], b: list[V]) -> list[V]:
            return [t.larger(x, y) for x, y in zip(a, b, strict=True)]

        return self.meeting.of(DRAWN, mine, larger)[0]

    def _found(self, may_go: V, width: V) -> V:
        """That bin where it is among this thread's, by the first block; -1 elsewhere."""
        first = t.thread_id() * SHARE
        sums = [t.integer(0)] * SHARE
        for block in range(self.meeting.blocks):
            there = i.remote(self.base + (first << 2), t.integer(block))
            parts = [x for n in range(0, SHARE, 4) for x in i.load_remote(there + 4 * n, 4)]
            sums = added(sums, parts)
        weights = []
        for n, parts_of_bin in enumerate(sums):
            top = t.exp2(i.signed_number(first + n) * width * -t.LOG2_E)
            weights.append(i.to_wide(i.to_number(parts_of_bin) * top * 2.0 ** (i.UNIT - FINEST)))
        whole = weights[0]
        for weight in weights[1:]:
            whole = whole + weight
        below = self._of_later_threads(whole)
        bin = t.integer(-1)
        for n in reversed(range(SHARE)):
            above = below + weights[n]
            bin = t.select((below <= may_go) & (above > may_go), first + n, bin)
            below = above
        return bin

    def _of_later_threads(self, value: V) -> V:
        """The sum of an int64 over the threads behind this one."""
        lane, warp, zero = t.thread_id() & 31, t.thread_id() >> 5, i.wide(0)
        later = zero
        for mask in (1, 2, 4, 8, 16):
            other = i.from_lane(value, mask)
            later = later + t.select((lane & mask).equals(0), other, zero)
            value = value + other
        at = self.candidates.warps
        t.when(lane.equals(0), lambda: t.store_shared(at + (warp << 3), i.apart(value)))
        t.block_barrier(THREADS)
        for n in range(WARPS):
            of_warp = i.pair(*t.load_shared(at + 8 * n, 2))
            later = later + t.select(warp < n, of_warp, zero)
        return later

    def _collect(self, about: Round, width: V, bin: V) -> list[V]:
        """Tokens of the bin to the first block; how many, what weighs less, what they weigh."""
        zero = i.wide(0)

        def visit(token: V, quad: list[V], _: list[V], carry: list[V]) -> list[V]:
            count, below, inside = carry
            for n, hot in enumerate(about.hot(quad)):
                its = self._bin(about, width, hot)[0]
                weighs = about.hottest - hot < WIDEST
                in_bin = weighs & its.equals(bin)
                t.when(in_bin, functools.partial(self.candidates.add, hot, token + n))
                weight = i.weight(hot - about.hottest)
                count = count + t.select(in_bin, t.integer(1), 0)
                inside = inside + t.select(in_bin, weight, zero)
                below = below + t.select(weighs & (its > bin), weight, zero)
            return [count, below, inside]

        sums = about.scores.walk([t.integer(0), zero, zero], visit, UNROLL)
        return self.meeting.of(FOUND, sums, added)

    def _first(self, about: Round, count: V, below: V, may_go: V) -> list[V]:
        """Of the tokens in the bin the lowest that is kept, by the first block."""
        score, token = self.candidates.mine(count)
        mine = t.thread_id() < count
        weight = t.select(mine, i.weight(score - about.hottest), i.wide(0))
        _, up_to = self.candidates.reach(count, score, token, weight)
        stays = mine & (below + up_to > may_go)
        turned = t.select(stays, t.number(0) - score, NOTHING)
        lowest, first = self.candidates.best(turned, token)
        return [t.number(0) - lowest, first]
