"""The token of a row that no few candidates decide: a draw from all that the filters keep."""

import dataclasses

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.sample_tokens import instructions as i
from pallas_kernels.sample_tokens.histogram import Histogram
from pallas_kernels.sample_tokens.meeting import DRAWN, Meeting, better
from pallas_kernels.sample_tokens.noise import threefry
from pallas_kernels.sample_tokens.pick import noise_word
from pallas_kernels.sample_tokens.round import Round, Threshold
from pallas_kernels.sample_tokens.scores import NOTHING, QUAD, Asked
from pallas_kernels.sample_tokens.search import Search

FARTHEST = 23.0
"""No draw from the Gumbel distribution by 32 bits is larger."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """By all blocks of the row."""

    asked: Asked
    meeting: Meeting
    histogram: Histogram

    def threshold(self, about: Round, total: V, lowest: V) -> Threshold:
        """What top-k and top-p keep; of the weight of all and the lowest score where there is
        top-p alone."""
        nothing = [t.integer(0), t.number(NOTHING), t.integer(0)]
        by_p = about.top_k.equals(0) & about.tail.differs(0)
        found, *ends = t.either(
            by_p, lambda: self.histogram.threshold(about, total, lowest), nothing
        )
        searches = about.top_k.differs(0) | (by_p & found.equals(0))
        return Threshold(*t.either(searches, Search(about, self.meeting).run, ends))

    def draw(self, about: Round, threshold: Threshold) -> V:
        asked = self.asked
        # A first draw, which most tokens are too unlikely to pass.
        noise = i.gumbel(noise_word(asked.seed, asked.step, about.token))
        kept = threshold.keeps(about.hottest, about.token)
        first = [t.select(kept, about.hottest + noise, NOTHING), about.token]

        def visit(token: V, quad: list[V], _: list[V], carry: list[V]) -> list[V]:
            hot = about.hot(quad)
            worth = [(x + FARTHEST > carry[0]) & (x >= threshold.score) for x in hot]

            def drawn() -> list[V]:
                best = carry
                for half in range(0, QUAD, 2):
                    bits = threefry(asked.seed, asked.step, (token + half) >> 1)
                    for n, word in enumerate(bits, half):
                        best = self._tried(about, threshold, hot[n], token + n, word, best)
                return best

            return t.either(worth[0] | worth[1] | worth[2] | worth[3], drawn, carry)

        drawn = about.scores.walk(first, visit, unroll=2)
        return self.meeting.of(DRAWN, drawn, better)[1]

    def _tried(
        self, about: Round, threshold: Threshold, hot: V, token: V, bits: V, best: list[V]
    ) -> list[V]:
        """The better of a token's draw and the best so far."""
        kept = threshold.keeps(hot, token) & (hot - about.hottest >= self.asked.floor)
        # -log(1 - v) is v at least, so that a v beyond this can't win; most are.
        room = t.exp2((hot - best[0]) * t.LOG2_E) * (1 + 2.0**-14)
        wins = kept & (i.to_number(bits) * 2.0**-32 < room)
        return t.either(wins, lambda: better(best, [hot + i.gumbel(bits), token]), best)
