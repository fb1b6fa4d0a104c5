"""Scores of continuations, and work that takes turns on one model, on random weights."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import Text
from qwen_jax.errors import UserError
from qwen_jax.model.cache import PAGE
from qwen_jax.scoring import Pair, scored
from tests.tiny_checkpoints import canonical, random_parameters, tiny_config

CONFIG = tiny_config(context_length=3 * PAGE)


@pytest.fixture(scope="module")
def engine() -> Engine:
    parameters = canonical(random_parameters(CONFIG))
    return Engine(CONFIG, {name: jnp.asarray(x) for name, x in parameters.items()}, slots=2)


def drawn(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, count).tolist()


def test_scores_are_the_logits(engine: Engine) -> None:
    """Of continuations that begin and end anywhere in a page, and share their beginnings."""
    long = drawn(0, 2 * PAGE + 9)
    pairs = [(long, drawn(i, length)) for i, length in enumerate((1, 5, PAGE - 9, 2))]
    pairs += [(long[:PAGE], long[PAGE:]), (long[: PAGE - 1], [3]), ([5], drawn(7, 3 * PAGE))]
    pairs += [(long[: PAGE + 1], drawn(9, 4)), ([1], [2])]
    free = engine.pool.available
    scores = list(scored(engine, pairs))  # while they are on their way, they hold the cache
    for (context, continuation), score in zip(pairs, scores, strict=True):
        logits = engine.logits([*context, *continuation][:-1]).astype(np.float64)
        wanted = log_softmax(logits[len(context) - 1 :], axis=-1)
        np.testing.assert_allclose(
            score.logprobs, wanted[range(len(continuation)), continuation], atol=2e-5
        )
        np.testing.assert_allclose(score.best, wanted.max(axis=-1), atol=2e-5)
        assert score.likeliest.tolist() == wanted.argmax(axis=-1).tolist()
        assert score.greedy.tolist() == (wanted.argmax(axis=-1) == continuation).tolist()
    assert engine.pool.available == free


def test_pairs_are_taken_as_they_are_needed(engine: Engine) -> None:
    taken: list[int] = []

    def pairs() -> Iterator[Pair]:
        for i in range(100):
            taken.append(i)
            yield drawn(i, 20), [i]

    free, scores = engine.pool.available, scored(engine, pairs())
    next(scores)
    assert len(taken) < 20
    scores.close()  # type: ignore[attr-defined]
    assert engine.pool.available == free


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (([], [1]), "need at least one token each"),
        (([1], []), "need at least one token each"),
        (([1] * 3 * PAGE, [1, 2]), f"of {3 * PAGE} tokens with a continuation of 2 is longer"),
        (
            ([1], [CONFIG.vocab_size]),
            f"The continuation has the token {CONFIG.vocab_size} at index 0",
        ),
        (([-1], [1]), "The context has the token -1 at index 0, but"),
    ],
)
def test_refused(engine: Engine, pair: Pair, words: str) -> None:
    with pytest.raises(UserError, match=f"pair 1: .*{words}"):
        list(scored(engine, [([1], [1]), pair]))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, presence_penalty=2.0)])
def test_schedulers_take_turns(engine: Engine, sampling: Sampling) -> None:
    """What one does between two turns of another changes nothing there."""

    def texts(order: str) -> dict[str, list[int]]:
        schedulers, found = {}, {}
        for seed, name in enumerate("ab"):
            schedulers[name], found[name] = Scheduler(engine), []
            schedulers[name].add(Text(drawn(seed, 20), 24, sampling))
        for name in order:
            found[name] += [token for news in schedulers[name].turn() for token in news.tokens]
        assert all(scheduler.idle for scheduler in schedulers.values())
        return found

    assert texts("a" * 8 + "b" * 8) == texts("ab" * 8) == texts("aab" * 4 + "b" * 4)
