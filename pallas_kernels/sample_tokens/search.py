"""Where a threshold lies, exactly, whatever the scores: a search over the bits of integers in the
scores' order, three bits a pass over all of them."""

import dataclasses
import functools

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.sample_tokens import instructions as i
from pallas_kernels.sample_tokens.meeting import SEARCHED, Meeting, added
from pallas_kernels.sample_tokens.round import Round
from pallas_kernels.sample_tokens.scores import LOWEST, order, ordered

BITS = 3
WAYS = 1 << BITS
"""Into which a pass divides the interval."""

KTH, REACHED, TIED = range(3)
"""What is searched in turn: the k-th score; the score down to which tokens reach p; the id down to
which tokens of that score do."""


@dataclasses.dataclass(frozen=True)
class Search:
    """Of a row's threshold, by all its blocks."""

    about: Round
    meeting: Meeting

    def run(self) -> list[V]:
        """Down to which score and id tokens are kept."""
        lowest = t.integer(LOWEST)
        start = [lowest, lowest, t.integer(0), i.wide(0)]
        _, reached, first, _ = t.loop(3, start, self._turn)
        return [ordered(reached), first]

    def _turn(self, what: V, carry: list[V]) -> list[V]:
        """One of the three; the carry is what they find, and how many tied tokens are kept."""
        kth, reached, first, keep = carry
        by_weight, by_id = what.equals(REACHED), what.equals(TIED)
        asked = t.select(by_id, keep.differs(0), self.about.top_k.differs(0))
        asked = t.select(by_weight, self.about.tail.differs(0), asked)
        low = t.select(by_id, t.integer(0), kth)
        # One beyond the first that nothing reaches, so that there is a pass even for one score.
        high = (
            t.select(by_id, t.integer(self.about.scores.vocab), order(self.about.hottest) + 1) + 1
        )
        high = t.select(asked, high, low + 1)
        count = t.select(by_id, keep, self.about.top_k.wide())

        def divide(state: list[V]) -> list[V]:
            low, high, _, at_high, total = state
            step = (high - low + (WAYS - 1)) >> BITS
            bounds = [low, *(t.smaller(low + step * n, high) for n in range(1, WAYS))]
            sums = self._sums(bounds, by_weight, by_id, kth, reached)
            total = t.select(total < 0, sums[0], total)
            need = t.select(by_weight, total - self.about.may_go(total), count)
            ends, at_ends = [*bounds[1:], high], [*sums[1:], at_high]
            found = [bounds[0], ends[0], sums[0], at_ends[0]]
            for n in range(1, WAYS):
                here = [bounds[n], ends[n], sums[n], at_ends[n]]
                wins = (sums[n] >= need) & bounds[n].differs(high)
                found = [t.select(wins, x, y) for x, y in zip(here, found, strict=True)]
            return [*found, total]

        start = [low, high, i.wide(0), i.wide(0), i.wide(-1)]
        found = t.loop_while(lambda s: (s[1] - s[0]).differs(1), start, divide)
        kept = t.either(by_weight & asked, lambda: [self._tied(*found)], [keep])
        return [
            t.select(what.equals(KTH), found[0], kth),
            t.select(by_id, reached, found[0]),
            t.select(by_id & asked, found[0], first),
            kept[0],
        ]

    def _weights(self, score: V) -> list[V]:
        return [self._weight(score)]

    def _weight(self, score: V) -> V:
        return i.weight(ordered(score) - self.about.hottest)

    def _sums(self, bounds: list[V], by_weight: V, by_id: V, kth: V, reached: V) -> list[V]:
        """The weights from each bound on, or how many tokens there are."""
        zero, one = i.wide(0), i.wide(1)

        def visit(token: V, quad: list[V], _: list[V], sums: list[V]) -> list[V]:
            for n, score in enumerate(self.about.hot(quad)):
                hot = order(score)
                there = t.select(by_id, hot.equals(reached), hot >= kth)
                (weight,) = t.either(by_weight, functools.partial(self._weights, hot), [one])
                weight = t.select(there, weight, zero)
                key = t.select(by_id, token + n, hot)
                more = [t.select(key >= bound, weight, zero) for bound in bounds]
                sums = added(sums, more)
            return sums

        sums = self.about.scores.walk([zero] * WAYS, visit, unroll=2)
        sums = self.meeting.of(SEARCHED, sums, added)
        # All have read the slot before the next pass fills it.
        i.cluster_barrier()
        return sums

    def _tied(self, low: V, _: V, at_low: V, at_high: V, total: V) -> V:
        """How many tokens of the score that is reached are kept, or 0 for all."""
        one = self._weight(low)
        there = (at_low - at_high) // one
        left = there - (self.about.may_go(total) - (total - at_low)) // one
        return t.select(left < there, left, i.wide(0))
