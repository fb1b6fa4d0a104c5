"""Texts that keep to their constraint by themselves are let go by its masks, and are the same."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import qwen_jax
from qwen_jax import Constraint
from qwen_jax.engine import calls, unmasked
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.texts import Text
from qwen_jax.engine.unmasked import Agreement, Trust, may_be
from qwen_jax.text.matching import Matcher
from tests.engines import fresh_engine, random_tokens, reshape, run_to_end
from tests.golden_cases import odd_config
from tests.listed import STOP, Listed

CONFIG = odd_config(num_layers=1, context_length=256)
VOCAB = CONFIG.vocab_size


@functools.cache
def engine(ahead: bool, lets_go: bool) -> Engine:
    made = fresh_engine(CONFIG, slots=3, stop_ids=(STOP,))
    reshape(made, steps=4, ahead=ahead, unmasked=lets_go)
    return made


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are let go after one token that agrees, and soon again."""
    monkeypatch.setattr(unmasked, "WORTH", 1.2)
    monkeypatch.setattr(unmasked, "FIRST_WAIT", 1)
    monkeypatch.setattr(unmasked, "LONGEST_WAIT", 2)


class Form(Listed):
    """Many places, each of which forbids some tokens; all texts have shown the same."""

    def __init__(self, length: int, share: float, seed: int):
        rng = np.random.default_rng(seed)
        allowed = rng.random((length, VOCAB)) >= share
        allowed[:, STOP] = False
        super().__init__([np.flatnonzero(place).tolist() for place in allowed])
        self.form = Form

    @property
    def forced(self) -> list[int]:
        """Nothing enters at once: it is not what is asked here."""
        return []

    @forced.setter
    def forced(self, tokens: list[int]) -> None: ...


def answers(made: Engine, texts: Sequence[Text]) -> list[list[int]]:
    told = run_to_end(made, texts)
    assert all(news.error is None for news in told)
    return [[t for news in told if news.text is text for t in news.tokens] for text in texts]


_ASKED = st.lists(
    st.tuples(
        st.integers(1, 70),  # of the prompt
        st.integers(1, 60),  # places
        st.integers(1, 60),  # tokens at most
        st.sampled_from([0.0, 0.05, 0.3]),  # forbidden
        st.sampled_from([0.0, 1.0]),  # temperature
    ),
    min_size=1,
    max_size=5,
)


@given(_ASKED, st.booleans())
@settings(max_examples=25, deadline=None)
def test_answers_are_the_same(asked: list[tuple[int, int, int, float, float]], ahead: bool) -> None:
    """However often texts are let go and go back, each in its own time, beside one that is free."""

    def texts() -> list[Text]:
        held = [
            Text(
                random_tokens(CONFIG, prompt, seed),
                limit,
                Sampling(temperature=temperature, seed=seed),
                constraint=Form(places, forbidden, seed),
            )
            for seed, (prompt, places, limit, forbidden, temperature) in enumerate(asked)
        ]
        return [*held, Text(random_tokens(CONFIG, 5), 40, Sampling(temperature=0.7))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unmasked, "WORTH", 1.2)
        patch.setattr(unmasked, "FIRST_WAIT", 1)
        patch.setattr(unmasked, "LONGEST_WAIT", 2)
        found, held = texts(), texts()
        assert answers(engine(ahead, True), found) == answers(engine(ahead, False), held)
    assert all(text.trust is not None for text in found[:-1])
    assert all(text.trust is None for text in held)


@pytest.mark.parametrize("ahead", [False, True])
def test_it_needs_few_masks(ahead: bool, eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes back as often as a place forbids what it chose."""
    made, masks = engine(ahead, True), list[int]()
    made.agreements.clear()
    choose = calls.choose
    monkeypatch.setattr(calls, "choose", lambda *args: masks.append(1) or choose(*args))
    prompt = random_tokens(CONFIG, 9)
    free = answers(made, [Text(prompt, 40)])[0]
    assert STOP not in free and len(free) == 40
    every = [token for token in range(VOCAB) if token != STOP]
    places = [every] * 20 + [[t for t in every if t != free[20]]] + [every] * 19
    text = Text(prompt, 40, top=2, constraint=Listed(places))
    told = run_to_end(made, [text])
    tokens = [token for news in told for token in news.tokens]
    assert text.trust is not None and text.trust.returns >= 1
    assert tokens[:20] == free[:20] and tokens[20] != free[20] and len(tokens) == 40
    assert sum(len(news.logprobs or ()) for news in told) == 40
    assert 2 < len(masks) < 14


def test_who_is_never_let_go() -> None:
    """Filters look at other tokens under a mask, and counts can't be taken back."""
    assert may_be(Sampling()) and may_be(Sampling(temperature=1.0, logit_bias={3: 1.0}))
    for other in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        assert not may_be(Sampling(temperature=1.0, **other))
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert not may_be(Sampling(**{name: 0.5}))
    drafting = fresh_engine(CONFIG, slots=2, draft_tokens=3)
    reshape(drafting, unmasked=True)
    assert not drafting.layout.unmasked


def test_trust_is_lost_and_won() -> None:
    agreement = Agreement()
    trust = Trust(agreement)
    for _ in range(14):
        trust.chose(alone=True)
        assert not trust.leaving
    trust.chose(alone=True)
    assert trust.leaving and trust.masked
    trust.let_go()
    assert not trust.masked and not trust.leaving
    trust.kept(64)
    trust.went_back(3)
    assert (
        trust.masked and trust.returns == 1 and (agreement.tokens, agreement.disagreed) == (83, 1)
    )
    needed = []
    for _ in range(9):
        count = 0
        while not trust.leaving:
            trust.chose(alone=True)
            count += 1
        needed.append(count)
        trust.let_go()
        trust.kept(1000)
        trust.went_back(0)
    assert needed[:4] == [8, 16, 32, 64] and max(needed) == 512


def test_a_form_that_disagrees_is_held() -> None:
    """Whatever one of its texts shows; and what was long ago counts less."""
    agreement = Agreement()
    agreement.saw(1000, 100)
    trust = Trust(agreement)
    for _ in range(100):
        trust.chose(alone=True)
    assert not trust.leaving and agreement.run < 16
    for _ in range(3):
        agreement.saw(4096, 0)
    assert agreement.run > 16
    trust.chose(alone=True)
    assert trust.leaving


@functools.cache
def model() -> qwen_jax.Model:
    made = qwen_jax.load(slots=4)
    reshape(made.engine, steps=8, ahead=True, unmasked=True)
    return made


FORMS = [
    Constraint.regex("[a-z]{2,4}( [a-z]{1,5}){0,3}"),
    Constraint.json_schema(
        {"type": "object", "properties": {"a": {"type": "string"}, "b": {"enum": ["x", "yes"]}}}
    ),
    Constraint.choice(["a river", "a reed", "rain"]),
    Constraint.lark('start: (line "\\n"){2}\nline: /[^\\n]{2,9}/'),
]


@given(st.sampled_from(FORMS), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_what_is_followed_is_what_a_mask_allows(form: Constraint, rng: random.Random) -> None:
    """Of any tokens: those that end a text, those that are no text, and those that don't fit."""
    tokenizer = model().tokenizer
    matcher, masks = Matcher(form, tokenizer), np.zeros((1, -(-2048 // 32)), np.uint32)
    chosen: list[int] = []
    for _ in range(rng.randint(1, 30)):
        matcher.forced = []  # of several spellings masks allow one, once it is known
        assert Matcher.fill([matcher], masks) == [None]
        allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")).tolist()
        wrong = [t for t in [rng.randrange(2048), *tokenizer.stop_ids] if t not in allowed]
        assert [matcher.follow([token]) for token in wrong] == [0] * len(wrong)
        chosen.append(rng.choice(allowed))
        assert matcher.follow(chosen[-1:]) == 1
        if chosen[-1] in tokenizer.stop_ids:
            break
    assert Matcher(form, tokenizer).follow(chosen) == len(chosen)
    never = tokenizer.encode("<|im_start|>")
    assert Matcher(form, tokenizer).follow([*chosen, *never]) == len(chosen)


def test_a_haiku_that_is_a_haiku_anyway() -> None:
    """Beside answers that the model would not have given."""
    free = model().generate("haiku: snow", max_tokens=40)
    held = {"sampling": Sampling(), "max_tokens": 40}
    line = "[a-z',. -]+"
    haiku = Constraint.regex(f"{line}\\n{line}\\n{line}")
    found = model().generate(["haiku: snow"] * 3, constraint=haiku, **held)
    assert [one.text for one in found] == [free.text] * 3
    assert [one.finish_reason for one in found] == ["stop"] * 3
    other = model().generate(["haiku: snow"], constraint=Constraint.regex("[xyz]{20}"), **held)
    assert re.fullmatch("[xyz]{20}", other[0].text)
    agreements = [*model().engine.agreements.values()]
    assert sorted(one.run > unmasked.WORTH for one in agreements) == [False, True]
