"""Whether a text's bits depend on what runs beside it, and on pages that another text has filled.

Texts are continued alone, all together, and all once more with their prompts' pages in the cache.
A difference is a fault where the engine was asked to be batch-invariant, and else a figure.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import Text
from qwen_jax.model.cache import PAGE

TEXTS, STEPS = 8, 12


class Answer(NamedTuple):
    """What a text got.

    Attributes:
        tokens: its continuation, greedy.
        logprobs: of them, float32.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Companions:
    """Answers of one kind of run beside those of texts alone.

    Attributes:
        texts: how many.
        same_bits: of them have the same tokens and log-probabilities, bit for bit.
        same_tokens: have the same tokens at least.
        apart: log-probabilities of equal tokens, before the first that differs, are so far apart.
    """

    texts: int
    same_bits: int
    same_tokens: int
    apart: float

    @classmethod
    def of(cls, alone: Sequence[Answer], others: Sequence[Answer]) -> "Companions":
        pairs, apart = list(zip(alone, others, strict=True)), 0.0
        for one, other in pairs:
            same = itertools.takewhile(
                lambda both: both[0][0] == both[1][0],
                zip(zip(*one, strict=True), zip(*other, strict=True), strict=False),
            )
            apart = max([apart, *(abs(p - q) for (_, p), (_, q) in same)])
        return cls(
            len(pairs),
            sum(one == other for one, other in pairs),
            sum(one.tokens == other.tokens for one, other in pairs),
            apart,
        )

    @property
    def invariant(self) -> bool:
        return self.same_bits == self.texts

    def __str__(self) -> str:
        if self.invariant:
            return f"all {self.texts} texts have the same bits"
        return (
            f"of {self.texts} texts {self.same_bits} have the same bits, {self.same_tokens} the "
            f"same tokens; log-probabilities are up to {self.apart:.1g} apart"
        )


def companions(engine: Engine) -> dict[str, Companions]:
    """Texts among others, and after their prompts have been seen, beside texts alone."""
    prompts = _prompts(engine)
    alone = []
    for prompt in prompts:
        engine.pool.forget_all()
        alone += answers(engine, [prompt])
    engine.pool.forget_all()
    together = answers(engine, prompts)
    again = answers(engine, prompts)
    return {
        "among others": Companions.of(alone, together),
        "after a prefix hit": Companions.of(alone, again),
    }


def _prompts(engine: Engine) -> list[list[int]]:
    """Of many lengths; half begin with the same page, where the context has room for one."""
    rng, config = np.random.default_rng(0), engine.config
    longest = min(config.context_length - STEPS - 1, 3 * PAGE)
    common = rng.integers(0, config.vocab_size, min(PAGE, longest - 1)).tolist()
    found = []
    for number in range(TEXTS):
        own = rng.integers(0, config.vocab_size, rng.integers(1, longest - len(common) + 1))
        found.append([*(common if number % 2 else ()), *own.tolist()])
    return found


def answers(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    """All at the same time, as far as there are slots."""
    scheduler = Scheduler(engine)
    texts = [Text(prompt, STEPS, top=0) for prompt in prompts]
    tokens: dict[Text, list[int]] = {text: [] for text in texts}
    logprobs: dict[Text, list[float]] = {text: [] for text in texts}
    for text in texts:
        scheduler.add(text)
    while not scheduler.idle:
        for news in scheduler.turn():
            tokens[news.text] += news.tokens
            logprobs[news.text] += [value for value, _ in news.logprobs or []]
    return [Answer(tuple(tokens[text]), tuple(logprobs[text])) for text in texts]
