"""Texts under a constraint through a scheduler: what is known enters at once, and nothing else is
another for it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from qwen_jax.engine import calls, constrained
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import Text
from tests.engines import fresh_engine, random_engine, random_tokens, reshape, run_to_end
from tests.golden_cases import odd_config
from tests.listed import STOP, Listed

CONFIG = odd_config(num_layers=1, context_length=256)
VOCAB = CONFIG.vocab_size


@functools.cache
def engine(ahead: bool = False) -> Engine:
    made = fresh_engine(CONFIG, slots=3, stop_ids=(STOP,))
    reshape(made, steps=4, ahead=ahead)
    return made


def answers(texts: Sequence[Text], ahead: bool = False) -> list[list[int]]:
    told = run_to_end(engine(ahead), texts)
    assert all(news.error is None for news in told)
    return [[t for news in told if news.text is text for t in news.tokens] for text in texts]


def likeliest(prompt: Sequence[int], places: Sequence[Sequence[int]], limit: int) -> list[int]:
    """What greedy choice among the places' tokens makes, by the logits of the whole text."""
    chosen: list[int] = []
    for allowed in [*places, [STOP]][:limit]:
        row = engine().logits([*prompt, *chosen])[-1]
        chosen.append(max(allowed, key=lambda token: row[token]))
    return chosen


_TOKEN = st.integers(2, VOCAB - 1)
_PLACES = st.lists(
    st.one_of(
        st.lists(_TOKEN, min_size=1, max_size=1).map(lambda one: [one] * 9),
        st.lists(st.lists(_TOKEN, min_size=2, max_size=5, unique=True), min_size=1, max_size=3),
        st.lists(_TOKEN, min_size=1, max_size=30).map(lambda known: [[token] for token in known]),
    ),
    max_size=4,
).map(lambda runs: [place for run in runs for place in run])


@given(st.lists(st.tuples(_PLACES, st.integers(1, 60)), min_size=1, max_size=5), st.data())
@settings(max_examples=15, deadline=None)
def test_what_is_known_enters_at_once(
    asked: list[tuple[list[list[int]], int]], data: st.DataObject
) -> None:
    """Whatever is found to be less work, and whether the next step begins before the last one is
    told, the tokens are those of single steps. Prompts end anywhere in a page, and limits fall
    anywhere."""
    prompts = [
        random_tokens(CONFIG, data.draw(st.integers(1, 140)), seed) for seed in range(len(asked))
    ]
    right = [likeliest(p, *rest) for p, rest in zip(prompts, asked, strict=True)]
    ahead = data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        steps_of_a_piece = data.draw(st.sampled_from([1e-9, 16, 1e9]))
        patch.setattr(constrained, "POSITIONS", {"cpu": steps_of_a_piece})
        texts = [
            Text(prompt, limit, constraint=Listed(places))
            for prompt, (places, limit) in zip(prompts, asked, strict=True)
        ]
        assert answers(texts, ahead) == right
    assert engine(ahead).pool.available == engine(ahead).pool.size


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """One entry for each call of a program from now on."""
    made: list[None] = []
    right = getattr(calls, name)

    def counted(*arguments: Any) -> Any:
        made.append(None)
        return right(*arguments)

    monkeypatch.setattr(calls, name, counted)
    return made


KNOWN = [[token] for token in range(2, 32)]
"""Thirty places without a choice."""


@pytest.mark.parametrize(
    "own, count",
    [
        ({}, 4),
        ({"sampling": Sampling(temperature=1.0, seed=3)}, 4),
        # These need a step for each of 35 tokens, and have four in a turn.
        ({"top": 0}, 36),
        ({"sampling": Sampling(frequency_penalty=0.5)}, 36),
    ],
)
def test_it_takes_fewer_steps(own: dict[str, Any], count: int, monkeypatch: Any) -> None:
    """Two where there is a choice, and the first of each that are known."""
    made = calls_of(monkeypatch, "advance")
    text = Text([5, 6, 7], 60, constraint=Listed([*KNOWN, [3, 4], *KNOWN[:3]]), **own)
    (found,) = answers([text])
    assert found[:30] == list(range(2, 32))
    assert found[30] in (3, 4) and found[31:] == [2, 3, 4, STOP]
    assert len(made) == count


def test_sampling_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its random numbers are those of a token's place, however the text came there."""
    free = [list(range(2, VOCAB))] * 6
    found = []
    for positions in (1e-9, 1e9):
        monkeypatch.setattr(constrained, "POSITIONS", {"cpu": positions})
        samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(7)]
        texts = [Text([9], 40, s, constraint=Listed([*KNOWN, *free])) for s in samplings]
        found.append(answers(texts))
    assert found[0] == found[1] and len({tuple(tokens) for tokens in found[0]}) > 5


def test_a_batch_invariant_engine_takes_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether several at once are less work depends on neighbours."""
    monkeypatch.setattr(constrained, "POSITIONS", {"cpu": 1e9})
    made = calls_of(monkeypatch, "advance")
    alone = random_engine(CONFIG, slots=2, stop_ids=(STOP,), batch_invariant=True)
    text = Text([5, 6, 7], 60, constraint=Listed(KNOWN))
    told = run_to_end(alone, [text])
    assert [token for news in told for token in news.tokens] == [*range(2, 32), STOP]
    assert len(made) >= 31


@pytest.mark.parametrize(
    "sampling, batch_invariant, looks",
    [
        (Sampling(temperature=1.0), False, False),
        (Sampling(frequency_penalty=0.5), False, True),
        (Sampling(logit_bias={3: 1.0}), False, True),
        (Sampling(temperature=1.0), True, True),
    ],
)
def test_who_looks_at_scores(
    sampling: Sampling, batch_invariant: bool, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What slots know of penalties and biases is left alone where nobody has any, unless neighbours
    could have; and steps are told the same again while texts are the same."""
    seen: list[tuple[bool, Any]] = []
    right = calls.choose

    def choose(spec: Any, logits: Any, state: Any, extras: Any, packed: Any, *rest: Any) -> Any:
        seen.append((extras is not None, packed))
        return right(spec, logits, state, extras, packed, *rest)

    monkeypatch.setattr(calls, "choose", choose)
    used = random_engine(CONFIG, slots=2, stop_ids=(STOP,), batch_invariant=batch_invariant)
    texts = [Text([5, 6], 20, sampling, constraint=Listed([[3, 4]] * 30)) for _ in range(2)]
    told = run_to_end(used, texts)
    assert sum(len(news.tokens) for news in told) == 40 and len(seen) >= 20
    assert {found for found, _ in seen} == {looks}
    changes = sum(a is not b for (_, a), (_, b) in itertools.pairwise(seen))
    assert changes <= 6, "two texts come and go"


@pytest.mark.parametrize("ahead", [False, True])
def test_who_comes_and_goes(ahead: bool) -> None:
    """Texts with a constraint and without share three slots; some are cancelled between two turns,
    when a step of theirs may be under way, and whoever gets their slots notices nothing."""
    rng = np.random.default_rng(7)
    alone: dict[Text, list[int]] = {}
    texts, doomed = [], []
    for number in range(24):
        prompt = random_tokens(CONFIG, int(rng.integers(1, 30)), number)
        sampling = Sampling(temperature=1.0, frequency_penalty=0.3 * (number % 3), seed=number)
        places = [list(range(2, VOCAB))] * int(rng.integers(5, 20))
        held = rng.random() < 0.5
        text, same = (
            Text(
                prompt,
                18,
                sampling,
                constraint=Listed([*places, *KNOWN[:9]]) if held else None,
            )
            for _ in range(2)
        )
        (alone[text],) = answers([same])
        texts.append(text)
        if rng.random() < 0.4:
            doomed.append(text)
    scheduler, told = Scheduler(engine(ahead)), {text: [] for text in texts}
    for text in texts:
        scheduler.add(text)
    while not scheduler.idle:
        for news in scheduler.turn():
            told[news.text] += news.tokens
        for text in doomed:
            if told[text] and not text.over:
                scheduler.cancel(text)
    for text in texts:
        right = alone[text]
        assert told[text] == (right[: len(told[text])] if text in doomed else right)
    assert engine(ahead).pool.available == engine(ahead).pool.size


@pytest.mark.parametrize("ahead", [False, True])
def test_masks_stay_until_all_devices_have_read_them(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device may read them in the host's memory, and only the end of the next step tells that
    all of a mesh have done so: nothing is written over the ones before."""
    given: list[tuple[np.ndarray, np.ndarray]] = []
    choose = calls.choose

    def spy(*args: Any) -> Any:
        given.append((args[5], args[5].copy()))
        for masks, as_given in given[-2:]:
            np.testing.assert_array_equal(masks, as_given)
        return choose(*args)

    monkeypatch.setattr(calls, "choose", spy)
    places = [[2 + step, 40 + step] for step in range(12)]
    answers([Text(random_tokens(CONFIG, 9), 20, constraint=Listed(places))], ahead)
    assert len(given) > 9 and not np.array_equal(given[0][1], given[1][1])
