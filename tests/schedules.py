"""Many different texts for a scheduler, and loops that watch it while it works."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.pool import Pool
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import NO_SLOT, News, Text
from qwen_jax.model.cache import PAGE
from tests.engines import fresh_engine, reshape
from tests.golden_cases import odd_config

CONFIG = odd_config(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, context_length=512)
"""Tables of four pages. Two small heads, since attention over whole tables is most of a step's time
where nothing is optimised: heads of 32 take 2.5 times as long."""


def many_rows(cache_tokens: int = 1024, **shapes: Any) -> Engine:
    """An engine with an empty cache whose steps are all of eight rows: the one shape of which a
    CPU's products give a row the same bits whatever the others hold."""
    engine = fresh_engine(CONFIG, cache_tokens=cache_tokens, batch_invariant=True)
    assert engine.shapes.rows == (8,)
    reshape(engine, **shapes)
    return engine


def drawn_sampling(rng: np.random.Generator) -> Sampling:
    """Greedy or hot, filtered, penalised, biased: one in three of each."""
    settings: dict[str, Any] = {"seed": int(rng.integers(2**32))}
    for name, value in {
        "temperature": float(rng.uniform(0.3, 2)),
        "top_k": int(rng.integers(1, 70)),
        "top_p": float(rng.uniform(0.3, 1)),
        "min_p": float(rng.uniform(0, 0.3)),
        "repetition_penalty": float(rng.uniform(0.8, 1.5)),
        "presence_penalty": float(rng.normal()),
        "frequency_penalty": float(rng.normal(0, 0.3)),
        "logit_bias": {int(t): float(rng.normal(0, 3)) for t in rng.choice(61, 3)},
    }.items():
        if rng.random() < 1 / 3:
            settings[name] = value
    return Sampling(**settings)


def drawn_text(rng: np.random.Generator, longest: int = 300, most: int = 50) -> Text:
    """A prompt and limit of any length, one in three with what many others begin with."""
    length = int(rng.integers(1, longest + 1))
    tokens = rng.integers(0, CONFIG.vocab_size, length).tolist()
    if rng.random() < 1 / 3:
        common = np.random.default_rng(int(rng.integers(3))).integers(0, CONFIG.vocab_size, 300)
        tokens[: length // 2] = common[: length // 2].tolist()
    top = int(rng.integers(0, 4)) if rng.random() < 0.3 else None
    sampling = drawn_sampling(rng) if rng.random() < 0.7 else Sampling()
    return Text(tokens, int(rng.integers(1, most + 1)), sampling, top)


def again(text: Text) -> Text:
    """The same work, to be done anew."""
    return Text(text.tokens, text.limit, text.sampling, text.top, text.score_from)


class Outcome(NamedTuple):
    """All that was told of one text."""

    tokens: list[int]
    logprobs: list[Any]
    scores: Any
    over: bool

    @classmethod
    def of(cls, text: Text, told: Iterable[News]) -> "Outcome":
        mine = [news for news in told if news.text is text]
        assert [news.over for news in mine].count(True) <= 1 and not any(
            news.over for news in mine[:-1]
        ), "something is told after the end"
        scores = [news.scores for news in mine if news.scores is not None]
        return cls(
            [token for news in mine for token in news.tokens],
            [entry for news in mine for entry in news.logprobs or []],
            [tuple(column.tolist() for column in columns) for columns in scores],
            bool(mine) and mine[-1].over,
        )


def watched(
    engine: Engine,
    texts: Sequence[Text],
    each_turn: Callable[[Scheduler, list[News]], None] = lambda scheduler, told: None,
) -> list[News]:
    """All news of texts that are added when there is soon room, as `Generation` does. They begin
    in their order, nobody waits forever, and no page or slot is held by two or lost."""
    scheduler, told, line, turns = Scheduler(engine), [], iter(texts), 0
    seated: set[Text] = set()
    more = True
    while more or not scheduler.idle:
        while more and scheduler.wants_more:
            text = next(line, None)
            if more := text is not None:
                scheduler.add(text)
        told += scheduler.turn()
        check_account(engine, texts)
        seated |= {news.text for news in told} | {t for t in texts if t.pages or t.row.size}
        asked = [text for text in texts if text in seated or not text.over]  # not cancelled before
        assert seated == set(asked[: len(seated)]), "someone overtook"
        each_turn(scheduler, told)
        turns += 1
        assert turns < 100 * (len(texts) + 1), "it never ends"
    assert engine.pool.available == engine.pool.size
    return told


def check_account(engine: Engine, texts: Sequence[Text]) -> None:
    """Pages and slots of texts at one moment."""
    pages = {page for text in texts for page in text.pages}
    own = [page for text in texts for page in text.pages[text.shared_tokens // PAGE :]]
    assert len(own) == len(set(own)), "two texts write to one page"
    assert engine.pool.size - engine.pool.available == len(pages)
    slots = [text.slot for text in texts if text.slot != NO_SLOT]
    assert len(slots) == len(set(slots)) and set(slots) <= set(range(engine.shapes.slots))


def alone(texts: Iterable[Text]) -> list[Outcome]:
    """What comes of each text by itself, in a cache that has seen no other."""
    engine, outcomes = many_rows(), []
    for text in texts:
        engine.pool, single = Pool(1 + engine.pool.size), again(text)
        outcomes.append(Outcome.of(single, watched(engine, [single])))
    return outcomes
