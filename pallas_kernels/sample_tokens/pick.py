"""The first block's last step: a few candidates, one a thread, each compared with all others."""

import dataclasses
from collections.abc import Callable

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.sample_tokens import instructions as i
from pallas_kernels.sample_tokens.meeting import ALL, WARPS, among, better
from pallas_kernels.sample_tokens.noise import threefry
from pallas_kernels.sample_tokens.scores import NOTHING, THREADS

MOST = THREADS
"""Candidates."""


def noise_word(seed: V, step: V, token: V) -> V:
    """The random bits of one token."""
    even, odd = threefry(seed, step, token >> 1)
    return t.select((token & 1).differs(0), odd, even)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """In the first block's shared memory: how many, their scores, ids and weights."""

    counter: V
    scores: V
    ids: V
    weights: V
    warps: V

    BYTES = 16 + MOST * (4 + 4 + 8) + WARPS * 8

    @classmethod
    def at(cls, base: V) -> "Candidates":
        scores = base + 16
        ids = scores + 4 * MOST
        weights = ids + 4 * MOST
        return cls(base, scores, ids, weights, weights + 8 * MOST)

    def clear(self) -> None:
        t.when(t.thread_id().equals(0), lambda: t.store_shared(self.counter, [t.integer(0)]))

    def add(self, score: V, token: V) -> None:
        """From any block of the cluster; beyond `MOST` they are only counted."""
        first = t.integer(0)
        place = i.count_remote(i.remote(self.counter, first))

        def leave() -> None:
            i.store_remote(i.remote(self.scores + (place << 2), first), score.bits())
            i.store_remote(i.remote(self.ids + (place << 2), first), token)

        t.when(place < MOST, leave)

    def mine(self, count: V) -> tuple[V, V]:
        """This thread's candidate; past the last one, and for whoever counts in fours, nothing."""
        at = t.thread_id() << 2

        def fill() -> None:
            t.store_shared(self.scores + at, [t.number(NOTHING)])
            t.store_shared(self.ids + at, [t.integer(0)])

        t.when(t.thread_id() >= count, fill)
        t.block_barrier(THREADS)
        (score,) = t.load_shared_floats(self.scores + at)
        (token,) = t.load_shared(self.ids + at)
        return score, token

    def ranks(self, count: V, score: V, token: V) -> tuple[V, V]:
        """How many are higher than this one, and besides equal with a lower id."""

        def turn(index: V, carry: list[V]) -> list[V]:
            higher, before = carry
            at = index << 4
            others = t.load_shared_floats(self.scores + at, 4)
            ids = t.load_shared(self.ids + at, 4)
            for other, other_id in zip(others, ids, strict=True):
                higher = higher + t.select(other > score, t.integer(1), 0)
                first = other.equals(score) & (other_id < token)
                before = before + t.select(first, t.integer(1), 0)
            return [higher, before]

        return self._over(count, turn, [t.integer(0)] * 2)

    def reach(self, count: V, score: V, token: V, weight: V) -> tuple[V, V]:
        """The weight of all, and of those up to this one: lower ones, equal ones of lower ids."""
        t.store_shared(self.weights + (t.thread_id() << 3), i.apart(weight))
        t.block_barrier(THREADS)

        def turn(index: V, carry: list[V]) -> list[V]:
            total, up_to = carry
            others = t.load_shared_floats(self.scores + (index << 4), 4)
            ids = t.load_shared(self.ids + (index << 4), 4)
            halves = [
                half
                for n in range(2)
                for half in t.load_shared(self.weights + (index << 5) + 16 * n, 4)
            ]
            for n, (other, other_id) in enumerate(zip(others, ids, strict=True)):
                of_other = i.pair(*halves[2 * n : 2 * n + 2])
                below = (other < score) | (other.equals(score) & (other_id <= token))
                total = total + of_other
                up_to = up_to + t.select(below, of_other, i.wide(0))
            return [total, up_to]

        return self._over(count, turn, [i.wide(0)] * 2)

    @staticmethod
    def _over(count: V, turn: Callable[[V, list[V]], list[V]], start: list[V]) -> tuple[V, V]:
        """Four candidates at a time, by the warps that have any of their own."""
        works = (t.thread_id() & -t.WARP) < count
        first, second = t.either(works, lambda: t.loop((count + 3) >> 2, start, turn), start)
        return first, second

    def best(self, score: V, token: V) -> list[V]:
        """The highest score of all threads and its id; every thread gets them."""
        mine = i.butterfly([score, token], better, ALL)
        lane, warp = t.thread_id() & 31, t.thread_id() >> 5
        t.when(lane.equals(0), lambda: t.store_shared(self.warps + (warp << 3), mine))
        t.block_barrier(THREADS)
        found = t.load_shared(self.warps + ((lane & (WARPS - 1)) << 3), 2)
        return i.butterfly([found[0].bits(), found[1]], better, among(WARPS))
