"""One row, by the blocks of a cluster: its log-probabilities, then its token.

1. Every thread finds the best of its tokens, the blocks the best of all, and a bound: with the
   m-th best of the threads' bests of every block, m tokens lie above the lowest of those.
2. Tokens above the bound, a few more than m, go to the first block, with the weight of all others.
   Where they hold the k-th token, or all that top-p keeps, that block compares each with each.
3. Where they don't, the threshold is looked for (`histogram.py`, `search.py`), and what it keeps is
   drawn from in one more pass, as it is at once where nothing is filtered (`drawing.py`).
"""

import dataclasses
import functools

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.sample_tokens import instructions as i
from pallas_kernels.sample_tokens.bounds import Bests
from pallas_kernels.sample_tokens.drawing import Drawing
from pallas_kernels.sample_tokens.meeting import FOUND, SEARCHED, Meeting, added, better
from pallas_kernels.sample_tokens.pick import MOST, Candidates, noise_word
from pallas_kernels.sample_tokens.round import Round
from pallas_kernels.sample_tokens.scores import NOTHING, THREADS, UNROLL, Asked, Scores

WANTED = MOST // 2
"""Tokens to be found above the bound, at most."""
CLOSE = 2.0**-20
"""What a bound is lowered by so that divisions can't lift a score over it, of its size."""
OK, BANNED, NOT_FINITE = 0, 1, 2
"""A row's status."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Addresses: of a row's token, status and log-probability, and of its `most` likeliest."""

    token: V
    status: V
    chosen: V
    top_ids: V
    top: V
    most: int

    def clear(self) -> None:
        def nothing() -> None:
            t.store_global(self.top_ids + (t.thread_id() << 2).wide(), [t.integer(-1)])
            t.store_global(self.top + (t.thread_id() << 2).wide(), [t.number(NOTHING)])

        t.when(t.thread_id() < self.most, nothing)
        t.block_barrier(THREADS)

    def report(self, rank: V, token: V, logprob: V) -> None:
        """One of the likeliest."""
        t.store_global(self.top_ids + (rank << 2).wide(), [token])
        t.store_global(self.top + (rank << 2).wide(), [logprob])


@dataclasses.dataclass(frozen=True)
class RowSampler:
    """The work of one block of a row's."""

    asked: Asked
    vocab: int
    valid: int
    blocks: int
    meeting: Meeting
    candidates: Candidates
    bests: Bests
    drawing: Drawing
    outputs: Outputs

    def run(self) -> None:
        rank = self.meeting.rank
        t.when(rank.equals(0), self.outputs.clear)
        first = t.select(self.asked.logprobs < 0, t.integer(1), 0)
        t.loop(2, [t.number(0)], lambda last, carry: self._round(rank, last, carry[0]), first)
        # Others may still read this block's shared memory.
        i.cluster_barrier()

    def _round(self, rank: V, number: V, normaliser: V) -> list[V]:
        """The first leaves the logarithm of all probabilities' sum for the second."""
        asked, last, leads = self.asked, number.differs(0), rank.equals(0)
        scores = Scores(asked, self.vocab, self.valid, self.blocks, rank, last)
        draws = last & (asked.temperature > 0.0)
        heat = t.select(draws, asked.temperature, 1.0)
        top_k = t.select((asked.top_k > 0) & (asked.top_k < self.vocab), asked.top_k, 0)
        top_k = t.select(last, top_k, t.larger(asked.logprobs, 1))
        tail = t.select(last, asked.tail, i.wide(0))
        filters = (draws & (top_k.differs(0) | tail.differs(0))) | number.equals(0)
        m = t.select(top_k > 0, t.smaller(top_k, WANTED), WANTED)
        t.when(leads, self.candidates.clear)
        best, token, own, bound = self.bests.find(scores, self.meeting, number, filters, m)
        finite = (own > NOTHING) & (own < float("inf"))
        there = finite & (best > NOTHING)
        about = Round(scores, last, draws, top_k, tail, heat, best, token, i.quotient(best, heat))
        nobody = [t.integer(0), t.integer(0), i.wide(1), t.number(NOTHING)]
        complete, count, total, lowest = t.either(
            filters & there, lambda: self._collect(about, bound), nobody
        )
        normaliser = t.select(last, normaliser, best + i.log_weight(total))

        def settle() -> list[V]:
            """The token, which the first block knows at least."""
            done, unknown = complete.differs(0), [t.integer(0)]

            def quickly() -> list[V]:
                return t.either(
                    leads, lambda: [self._pick(about, count, total, normaliser)], unknown
                )

            def slowly() -> list[V]:
                t.when(number.equals(0), lambda: self._list(about, leads, normaliser))
                return t.either(last, lambda: self._draw(about, total, lowest), unknown)

            quick = t.either(done, quickly, unknown)
            return t.either(done.equals(0), slowly, quick)

        (token,) = t.either(there & (draws | number.equals(0)), settle, [token])
        status = t.select(finite, t.select(there, t.integer(OK), BANNED), NOT_FINITE)
        writes = last & leads & t.thread_id().equals(0)
        t.when(writes, lambda: self._report(token, status, normaliser))
        return [normaliser]

    def _collect(self, about: Round, bound: V) -> list[V]:
        """Whether tokens above the bound are all that matter, and how many they are; the weight of
        all tokens and their lowest score, where it goes by weight."""
        limit, zero = i.quotient(bound, about.heat), i.wide(0)
        # A score below this has a quotient below the limit, which spares most a division.
        close = bound - t.larger(t.larger(bound, t.number(0) - bound) * CLOSE, 1e-30)
        weighs = about.last.equals(0) | about.top_k.equals(0)

        def visit(token: V, quad: list[V], _: list[V], carry: list[V]) -> list[V]:
            found, *sums = carry

            def collect() -> list[V]:
                count = found
                for n, x in enumerate(about.hot(quad)):
                    near = (x >= limit) & (x > NOTHING)
                    t.when(near, functools.partial(self.candidates.add, x, token + n))
                    count = count + t.select(near, t.integer(1), 0)
                return [count]

            def weigh() -> list[V]:
                total, below, lowest = sums
                for x in about.hot(quad):
                    weight = i.weight(x - about.hottest)
                    total = total + weight
                    below = below + t.select(x < limit, weight, zero)
                    lowest = t.smaller(lowest, t.select(x > NOTHING, x, about.hottest))
                return [total, below, lowest]

            near = [x >= close for x in quad]
            any_near = near[0] | near[1] | near[2] | near[3]
            return [*t.either(any_near, collect, [found]), *t.either(weighs, weigh, sums)]

        def combine(a: list[V], b: list[V]) -> list[V]:
            return [*added(a[:3], b[:3]), t.smaller(a[3], b[3])]

        sums = about.scores.walk([t.integer(0), zero, zero, about.hottest], visit, UNROLL)
        count, total, below, lowest = self.meeting.of(FOUND, sums, combine)
        enough = t.select(about.top_k > 0, count >= about.top_k, below <= about.may_go(total))
        complete = (count <= MOST) & (enough | limit.equals(NOTHING))
        return [t.select(complete, t.integer(1), 0), count, total, lowest]

    def _pick(self, about: Round, count: V, total: V, normaliser: V) -> V:
        """From the candidates, by the first block: reports the likeliest, or draws the token."""
        score, token = self.candidates.mine(count)
        higher, before = self.candidates.ranks(count, score, token)
        mine = t.thread_id() < count
        rank = higher + before
        reports = mine & about.last.equals(0) & (rank < self.asked.logprobs)
        t.when(reports, lambda: self.outputs.report(rank, token, score - normaliser))

        def draw() -> list[V]:
            below = score - about.hottest
            kept = mine & (about.top_k.equals(0) | (higher < about.top_k))

            def reached() -> list[V]:
                weight = t.select(kept, i.weight(below), i.wide(0))
                sum_kept, up_to = self.candidates.reach(count, score, token, weight)
                everything = t.select(about.top_k > 0, sum_kept, total)
                may_go = about.may_go(everything)
                return [kept & (everything - sum_kept + up_to > may_go)]

            (stays,) = t.either(about.tail.differs(0), reached, [kept])
            stays = stays & (below >= self.asked.floor)
            noise = i.gumbel(noise_word(self.asked.seed, self.asked.step, token))
            return self.candidates.best(t.select(stays, score + noise, NOTHING), token)[1:]

        return t.either(about.last, draw, [t.integer(0)])[0]

    def _draw(self, about: Round, total: V, lowest: V) -> list[V]:
        return [self.drawing.draw(about, self.drawing.threshold(about, total, lowest))]

    def _list(self, about: Round, leads: V, normaliser: V) -> None:
        """The likeliest tokens one by one, a pass for each, where too many are as likely."""
        unit = [t.number(NOTHING), t.integer(1 << 30)]

        def turn(rank: V, last: list[V]) -> list[V]:
            score, token = last

            def visit(first: V, quad: list[V], _: list[V], best: list[V]) -> list[V]:
                for n, x in enumerate(quad):
                    after = (x < score) | (x.equals(score) & (first + n > token))
                    best = better(best, [t.select(after, x, NOTHING), first + n])
                return best

            found = about.scores.walk(unit, visit, unroll=2)
            found = self.meeting.of(SEARCHED, found, better)
            i.cluster_barrier()
            there = leads & t.thread_id().equals(0) & (found[0] > NOTHING)
            t.when(there, lambda: self.outputs.report(rank, found[1], found[0] - normaliser))
            return found

        t.loop(self.asked.logprobs, [t.number(float("inf")), t.integer(-1)], turn)

    def _report(self, token: V, status: V, normaliser: V) -> None:
        asked, fine = self.asked, status.equals(OK)
        token = t.select(status.equals(BANNED), t.integer(-1), token)
        reports = fine & (asked.logprobs >= 0)
        at = asked.logits + (t.larger(token, 0) << 2).wide()
        (logit,) = t.load_global(at, where=reports)
        t.store_global(self.outputs.token, [token])
        t.store_global(self.outputs.status, [status])
        chosen = t.select(reports, logit.bits() - normaliser, NOTHING)
        t.store_global(self.outputs.chosen, [chosen])
