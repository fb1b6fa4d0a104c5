"""A row as the threads of its blocks see it: what it asks for, and its scores, four at a time."""

import dataclasses
from collections.abc import Callable, Sequence

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.sample_tokens import instructions as i

THREADS = 512
"""Of a block."""
QUAD = 4
"""Tokens that a thread takes together: 16 bytes of logits."""
UNROLL = 5
"""Quads whose loads are on their way together: of eight blocks a thread has two times as many."""
NOTHING = float("-inf")
NOTHING_BITS = -(1 << 23)

Visit = Callable[[V, list[V], list[V], list[V]], Sequence[V]]
"""(the first token's id, four scores, the model's own logits, carry) -> carry."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A row's settings, every thread's, and addresses of what is read of it.

    Attributes:
        tail: 1 - top_p in units of 2^-64.
        seen, generated, bias, allowed: None where no row has them.
    """

    temperature: V
    top_k: V
    tail: V
    floor: V
    repetition: V
    presence: V
    frequency: V
    biased: V
    masked: V
    seed: V
    logprobs: V
    step: V
    logits: V
    bias: V | None
    seen: V | None
    generated: V | None
    allowed: V | None

    @classmethod
    def read(
        cls, row: V, vocab: int, most: int, numbers: Sequence[V], arrays: Sequence[V | None]
    ) -> "Asked":
        """Of a row, from the addresses of the settings and the step, and of the arrays; `most`
        log-probabilities are reported."""
        words = -(-vocab // 32)
        read = [t.load_global(at + (row << 2).wide())[0] for at in numbers]
        heat, top_k, tail, *floats, biased, masked, seed, logprobs, step = read
        # The largest below 1 removes all tokens but the last, as 1 would.
        tail = i.to_wide(t.smaller(tail.bits(), 1 - 2.0**-24) * 2.0**63) * 2

        def of(at: V, width: int) -> V:
            return at + row.wide() * (4 * width)

        logits, bias, seen, generated, allowed = (
            None if at is None else of(at, words if masks else vocab)
            for at, masks in zip(arrays, (0, 0, 1, 0, 1), strict=True)
        )
        assert logits is not None
        floor, repetition, presence, frequency = (x.bits() for x in floats)
        return cls(
            temperature=heat.bits(), top_k=top_k, tail=tail, floor=floor, repetition=repetition,
            presence=presence, frequency=frequency, biased=biased, masked=masked, seed=seed,
            logprobs=t.smaller(logprobs, most), step=step, logits=logits, bias=bias, seen=seen,
            generated=generated, allowed=allowed,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scores:
    """All scores of a row, or the model's own logits, dealt out to the threads of its blocks.

    Attributes:
        processed: whether bias, penalties and mask apply: a condition.
        rank, blocks: which block of how many.
    """

    asked: Asked
    vocab: int
    valid: int
    blocks: int
    rank: V
    processed: V

    @property
    def _penalises(self) -> V:
        asked = self.asked
        return (
            asked.repetition.differs(1.0)
            | asked.presence.differs(0.0)
            | asked.frequency.differs(0.0)
        )

    def walk(self, carry: Sequence[V], visit: Visit, unroll: int) -> list[V]:
        """Visits the thread's share; loads of so many quads are on their way together."""
        asked, stride = self.asked, self.blocks * THREADS
        quads = self.vocab // QUAD
        turns = -(-quads // (stride * unroll))
        first = self.rank * THREADS + t.thread_id()
        biased, masked = asked.biased.differs(0), asked.masked.differs(0)
        changes = self.processed & (biased | masked | self._penalises)

        def turn(index: V, carry: list[V]) -> list[V]:
            at = [index * (stride * unroll) + first + n * stride for n in range(unroll)]
            own = [x for quad in at for x in self._own(quad, quad < quads)]
            scores = own
            if any(a is not None for a in (asked.bias, asked.seen, asked.allowed)):
                scores = t.either(changes, lambda: self._changed(at, own, quads), own)
            for n, quad in enumerate(at):
                four = slice(QUAD * n, QUAD * n + QUAD)
                carry = list(visit(quad << 2, scores[four], own[four], carry))
            return carry

        return t.loop(turns, carry, turn)

    def _own(self, quad: V, there: V) -> list[V]:
        """The model's own logits of a quad."""
        at = self.asked.logits + (quad << 4).wide()
        logits = t.load_global(at, QUAD, where=there, otherwise=NOTHING_BITS)
        token = quad << 2

        def shortened() -> list[V]:
            return [t.select(token + n < self.valid, x, NOTHING_BITS) for n, x in enumerate(logits)]

        past = token > self.valid - QUAD
        return [x.bits() for x in t.either(past, shortened, logits)]

    def _changed(self, at: list[V], own: list[V], quads: int) -> list[V]:
        """Scores of quads, of their logits."""
        asked = self.asked

        def bits(mask: V | None, read: V, otherwise: int) -> list[V | None]:
            """Of a mask, those of each quad, the lowest first."""
            if mask is None:
                return [None] * len(at)
            words = [
                t.load_global(
                    mask + ((quad >> 3) << 2).wide(),
                    where=read & (quad < quads),
                    otherwise=otherwise,
                )[0]
                for quad in at
            ]
            return [word >> ((quad & 7) << 2) for word, quad in zip(words, at, strict=True)]

        seen = bits(asked.seen, self._penalises, 0)
        allowed = bits(asked.allowed, asked.masked.differs(0), -1)
        out = []
        for n, quad in enumerate(at):
            scores = own[QUAD * n : QUAD * n + QUAD]
            scores = self._biased(quad, scores, asked.biased.differs(0) & (quad < quads))
            scores = self._penalised(quad, scores, seen[n])
            out += self._allowed(scores, allowed[n])
        return out

    def _biased(self, quad: V, scores: list[V], there: V) -> list[V]:
        if self.asked.bias is None:
            return scores
        at = self.asked.bias + (quad << 4).wide()

        def add() -> list[V]:
            bias = t.load_global(at, QUAD)
            return [x + b.bits() for x, b in zip(scores, bias, strict=True)]

        return t.either(there, add, scores)

    @staticmethod
    def _allowed(scores: list[V], allowed: V | None) -> list[V]:
        if allowed is None:
            return scores

        def ban() -> list[V]:
            return [
                t.select((allowed & (1 << n)).differs(0), x, NOTHING) for n, x in enumerate(scores)
            ]

        return t.either((allowed & 15).differs(15), ban, scores)

    def _penalised(self, quad: V, scores: list[V], seen: V | None) -> list[V]:
        """Scores of four tokens, of which some may stand in the text."""
        asked, factor, generated = self.asked, self.asked.repetition, self.asked.generated
        if seen is None or generated is None:
            return scores
        times = generated + (quad << 4).wide()

        def lower() -> list[V]:
            lowered = [
                t.select(x > 0.0, i.quotient(x, factor), i.product(x, factor)) for x in scores
            ]

            def counted() -> list[V]:
                out = []
                for x, count in zip(lowered, t.load_global(times, QUAD), strict=True):
                    less = x - t.select(count > 0, asked.presence, 0.0)
                    out.append(less - i.product(asked.frequency, i.signed_number(count)))
                return out

            counts = asked.presence.differs(0.0) | asked.frequency.differs(0.0)
            return [
                t.select((seen & (1 << n)).differs(0), x, score)
                for n, (x, score) in enumerate(
                    zip(t.either(counts, counted, lowered), scores, strict=True)
                )
            ]

        return t.either((seen & 15).differs(0), lower, scores)


def order(score: V) -> V:
    """An int32 that is as much larger or smaller as the number; both zeroes have the same."""
    bits = t.select(score.equals(0.0), t.number(0), score).bits()
    return t.select(bits < 0, bits ^ 0x7FFFFFFF, bits)


def ordered(order: V) -> V:
    """The number of an `order`."""
    return t.select(order < 0, order ^ 0x7FFFFFFF, order).bits()


LOWEST = NOTHING_BITS ^ 0x7FFFFFFF
"""The order of -inf."""
