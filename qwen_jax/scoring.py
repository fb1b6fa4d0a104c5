"""How likely a model finds texts: continuations of contexts through the engine's scheduler."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from qwen_jax.arguments import check
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.replicas import line_for
from qwen_jax.engine.texts import News, Text
from qwen_jax.errors import UserError

Pair = tuple[Sequence[int], Sequence[int]]
"""The ids of a context, and of what comes after it."""


class Score(NamedTuple):
    """Of each token of a continuation, given all before it.

    Attributes:
        logprobs: the model's own log-probabilities.
        best: the likeliest token's,
        likeliest: and which that is.
        greedy: whether it is the one there.
    """

    logprobs: Float[np.ndarray, "T"]
    best: Float[np.ndarray, "T"]
    likeliest: Int[np.ndarray, "T"]
    greedy: Bool[np.ndarray, "T"]

    @classmethod
    def of(cls, news: News) -> "Score":
        """What is told of a text that was to be scored."""
        assert news.scores is not None and news.text.score_from is not None
        logprob, best, likeliest = map(np.asarray, news.scores)
        return cls(logprob, best, likeliest, likeliest == news.text.tokens[news.text.score_from :])


class ToScore(NamedTuple):
    """Ids of a text that is to be scored from the second one on; there are two at least."""

    tokens: Sequence[int]


class Scored(NamedTuple):
    """The score of the text of this number."""

    number: int
    score: Score


def scored(engine: Engine, pairs: Iterable[Pair]) -> Iterator[Score]:
    """The pairs' scores, in their order.

    They are taken from their iterable when there is soon room for them, and pages of contexts that
    begin alike are computed once.

    Raises:
        UserError: while iterating: a context or a continuation is empty, they hold no ids of this
            vocabulary, or together they are longer than the model's context or the whole cache.
    """
    scheduler, left, more = line_for(engine), enumerate(pairs), True
    line: deque[Text] = deque()
    found: dict[Text, Score] = {}
    try:
        while more or line:
            while more and scheduler.wants_more:
                if more := (numbered := next(left, None)) is not None:
                    line.append(_text(engine, *numbered))
                    scheduler.add(line[-1])
            for news in scheduler.turn():
                found[news.text] = Score.of(news)
            while line and line[0] in found:
                yield found.pop(line.popleft())
    finally:
        scheduler.close()


def _text(engine: Engine, index: int, pair: Pair) -> Text:
    try:
        check("a pair to be scored", pair, Pair)
        return to_be_scored(engine, *pair)
    except UserError as error:
        raise UserError(f"pair {index}: {error}") from error


def to_be_scored(engine: Engine, context: Sequence[int], continuation: Sequence[int]) -> Text:
    """A scheduler's text of a pair. Raises UserError as `scored` does."""
    tokens, config = [*context, *continuation], engine.config
    if not (len(context) and len(continuation)):
        raise UserError("A context and its continuation need at least one token each.")
    # The last token is only scored, and takes no place.
    if len(tokens) - 1 > config.context_length:
        raise UserError(
            f"A context of {len(context)} tokens with a continuation of {len(continuation)} is "
            f"longer than the {config.context_length} of {config.source}; shorten the context."
        )
    engine.check_ids(context, "The context")
    engine.check_ids(continuation, "The continuation")
    engine.check_fits(len(tokens) - 1)
    return Text(tokens, score_from=len(context))
