"""What one of a row's two rounds is about: the model's own likeliest tokens, or the token."""

import dataclasses

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.sample_tokens import instructions as i
from pallas_kernels.sample_tokens.scores import Scores


@dataclasses.dataclass(frozen=True)
class Round:
    """Of it, what all threads know.

    Attributes:
        last: it is about the token: a condition, as is `draws`.
        top_k: 0 keeps all.
        tail: 1 - top_p in units of 2^-64; 0 keeps all.
        heat: the temperature.
        best, token: the highest score and the first id that has it.
        hottest: `best` over the temperature.
    """

    scores: Scores
    last: V
    draws: V
    top_k: V
    tail: V
    heat: V
    best: V
    token: V
    hottest: V

    def hot(self, scores: list[V]) -> list[V]:
        """Scores over the temperature."""
        return t.either(
            self.heat.differs(1.0), lambda: [i.quotient(x, self.heat) for x in scores], scores
        )

    def may_go(self, total: V) -> V:
        """Of the weight of all tokens what top-p may remove: the tail, but not everything."""
        return t.smaller(i.upper_product(total, self.tail), total - 1)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Tokens above `score` are kept, and of those equal to it the ids from `first`."""

    score: V
    first: V

    def keeps(self, score: V, token: V) -> V:
        return (score > self.score) | (score.equals(self.score) & (token >= self.first))
