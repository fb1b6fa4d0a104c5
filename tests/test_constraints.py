"""Answers under a constraint: valid, of the model's own law, and nothing to their neighbours."""

import functools
import json
import re
from typing import Any

import hypothesis.strategies as st
import jsonschema
import numpy as np
import pytest
import scipy.stats
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

import qwen_jax
from qwen_jax import Constraint, Sampling
from qwen_jax.text import matching
from qwen_jax.text.matching import Matcher
from tests.random_schemas import any_of, arrays

WARM = Sampling(temperature=1.0)
POEM = {
    "type": "object",
    "properties": {"lines": {"type": "integer", "minimum": 1}, "about": {"enum": ["snow", "ice"]}},
    "required": ["lines", "about"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model() -> qwen_jax.Model:
    return qwen_jax.load(batch_invariant=True)


def allowed(matcher: Matcher, vocab: int = 2048) -> NDArray[np.int64]:
    mask = np.zeros((1, -(-vocab // 32)), np.uint32)
    assert Matcher.fill([matcher], mask) == [None]
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


@pytest.mark.parametrize(
    "constraint, pattern",
    [
        (Constraint.regex("[ab]{3,5}c"), "[ab]{3,5}c"),
        (Constraint.choice(["yes", 'a "no"', "日本"]), 'yes|a "no"|日本'),
        (Constraint.lark('start: "a" b\nb: /[xy]/ "!"'), "a[xy]!"),
        (Constraint.json_schema(POEM), r'\{"lines": [1-9]\d*, "about": "(snow|ice)"\}'),
    ],
    ids=lambda given: getattr(given, "kind", ""),
)
def test_answers_fit(model: qwen_jax.Model, constraint: Constraint, pattern: str) -> None:
    """Of samples, beside each other; they end by themselves."""
    found = model.generate(
        ["haiku: snow"], n=12, sampling=WARM, max_tokens=60, constraint=constraint
    )
    for answer in found:
        assert re.fullmatch(pattern, answer.text), answer.text
        assert answer.finish_reason == "stop" and answer.tokens[-1] in model.tokenizer.stop_ids


def test_greedy_is_the_likeliest_that_is_allowed(model: qwen_jax.Model) -> None:
    """At every step, by the logits of the whole text."""
    prompt = model.tokens("haiku: snow")
    constraint = Constraint.json_schema(POEM)
    answer = model.generate(prompt, max_tokens=40, constraint=constraint)
    logits = model.logits([*prompt, *answer.tokens])[len(prompt) - 1 :]
    matcher = Matcher(constraint, model.tokenizer)
    for row, token in zip(logits, answer.tokens, strict=False):
        ids = allowed(matcher)
        assert token == ids[row[ids].argmax()]
        Matcher.take([matcher], [[token]])
    assert json.loads(answer.text)["about"] in ("snow", "ice")


def test_the_law_is_the_models_own_renormalised(model: qwen_jax.Model) -> None:
    """A first token out of those that are allowed, 400 times, against a softmax of their logits
    in float64; with the seeds fixed the outcome is, too."""
    prompt = model.tokens("snow", raw=True)
    constraint = Constraint.regex("[a-z ]{4}x")
    ids = allowed(Matcher(constraint, model.tokenizer))
    logits = model.logits(prompt)[-1].astype(np.float64)[ids]
    law = np.exp(logits - logits.max())
    law /= law.sum()
    count = 400
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(count)]
    found = model.generate(
        [prompt] * count, samplings=samplings, max_tokens=1, constraint=constraint
    )
    drawn = np.array([answer.tokens[0] for answer in found])
    assert set(drawn) <= set(ids)
    counts = np.array([(drawn == token).sum() for token in ids])
    rare = law * count < 5  # too rare to count by themselves
    observed = [*counts[~rare], counts[rare].sum()]
    expected = [*(law[~rare] * count), law[rare].sum() * count]
    kept = np.array(expected) > 0
    assert len(observed) > 4
    chi = ((np.array(observed) - expected)[kept] ** 2 / np.array(expected)[kept]).sum()
    assert chi < scipy.stats.chi2.isf(1e-4, kept.sum() - 1), (observed, expected)


def test_thousands_of_choices(model: qwen_jax.Model) -> None:
    choices = [f"number {number} of many" for number in range(20_000)]
    answer = model.generate("x", constraint=Constraint.choice(choices), sampling=WARM)
    assert answer.text in choices


def test_log_probabilities_are_the_models_own(model: qwen_jax.Model) -> None:
    """Before the mask, as before every other setting."""
    prompt = model.tokens("haiku: snow")
    answer = model.generate(
        prompt, max_tokens=9, constraint=Constraint.choice(["yes", "no"]), top_logprobs=3
    )
    logits = model.logits([*prompt, *answer.tokens])[len(prompt) - 1 :].astype(np.float64)
    own = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for row, entry in zip(own, answer.logprobs, strict=False):
        assert abs(entry.logprob - row[entry.token]) < 1e-4
        assert entry.top[0][0] == row.argmax()


def test_neighbours_notice_nothing(model: qwen_jax.Model) -> None:
    """Neither those without a constraint nor those with another; with penalties, too."""
    prompts = ["haiku: snow", "haiku: rust", "haiku: moss"]
    kinds = [None, Constraint.json_schema(POEM), Constraint.regex("[a-z ]{20}")]
    penalised = Sampling(temperature=0.9, frequency_penalty=0.3, repetition_penalty=1.1)

    def request(i: int) -> qwen_jax.Request:
        sampling = penalised if i % 2 else WARM
        return model.request(
            prompts[i % 2], constraint=kinds[i % 3], sampling=sampling, max_tokens=8
        )

    together = {p.number: p.completion for p in model.run(map(request, range(18))) if p.completion}
    for i in range(6):
        (alone,) = [p.completion for p in model.run([request(i)]) if p.completion]
        for other in range(i, 18, 6):
            assert together[other] == alone


def test_what_is_cut_is_said_to_be(model: qwen_jax.Model) -> None:
    answer = model.generate("x", constraint=Constraint.json_schema(POEM), max_tokens=5)
    assert answer.finish_reason == "length" and len(answer.tokens) == 5
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.text)


_LEAF = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)},
        st.integers(-999, 999),
        st.integers(-999, 999),
    ),
    st.builds(lambda n: {"type": "number", "minimum": n, "maximum": n + 9}, st.integers(-9, 9)),
    st.builds(
        lambda a, b: {"type": "string", "minLength": min(a, b), "maxLength": max(a, b)},
        st.integers(0, 6),
        st.integers(0, 6),
    ),
    st.just({"type": "string", "pattern": "^[a-f]{2,4}$"}),
    st.sampled_from([{"type": "string", "format": form} for form in ("date", "ipv4", "uuid")]),
    st.lists(st.text(max_size=4) | st.integers(-5, 5), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
    st.text(max_size=4).map(lambda value: {"const": value}),
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def made(properties: dict[str, Any], needed: list[bool]) -> dict[str, Any]:
        names = [name for name, is_needed in zip(properties, needed, strict=False) if is_needed]
        return {
            "type": "object",
            "properties": properties,
            "required": names,
            "additionalProperties": False,
        }

    names = st.text('abcxyz_ é"\\', min_size=1, max_size=4)
    flags = st.lists(st.booleans(), min_size=3, max_size=3)
    return st.builds(made, st.dictionaries(names, inner, max_size=3), flags)


_SCHEMAS = st.recursive(
    _LEAF,
    lambda inner: _objects(inner) | arrays(inner) | any_of(inner),
    max_leaves=6,
)


@given(_SCHEMAS, st.integers(0, 2**32 - 1))
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_whatever_is_allowed_makes_valid_json(
    model: qwen_jax.Model, schema: dict[str, Any], seed: int
) -> None:
    """Any tokens that the masks let through, of a hundred random schemas, against jsonschema."""
    assert_valid(model, schema, seed)


@pytest.mark.long
@given(st.lists(st.tuples(_SCHEMAS, st.integers(0, 2**32 - 1)), min_size=25, max_size=25))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_thousand_schemas(asked: list[tuple[dict[str, Any], int]]) -> None:
    """What the model itself writes, 25 answers beside each other, where tokens that are known enter
    at once. An answer that is cut says so."""
    model = jumping_model()
    requests = [
        model.request(
            "haiku: snow",
            constraint=Constraint.json_schema(schema),
            sampling=Sampling(temperature=2.0, seed=seed),
            max_tokens=200,
        )
        for schema, seed in asked
    ]
    answers = {piece.number: piece.completion for piece in model.run(requests) if piece.completion}
    whole = [number for number, answer in answers.items() if answer.finish_reason == "stop"]
    for number in whole:
        jsonschema.validate(json.loads(answers[number].text), asked[number][0])
    assert len(answers) == 25 and len(whole) > 15


@functools.cache
def jumping_model() -> qwen_jax.Model:
    return qwen_jax.load()


def assert_valid(model: qwen_jax.Model, schema: dict[str, Any], seed: int) -> None:
    rng, text = np.random.default_rng(seed), b""
    matcher = Matcher(Constraint.json_schema(schema), model.tokenizer)
    stops = set(model.tokenizer.stop_ids)
    for _ in range(1000):
        ids = allowed(matcher)
        assert len(ids), text
        if stops & set(ids.tolist()) and (len(ids) == len(stops) or rng.random() < 0.5):
            break
        token = int(rng.choice([i for i in ids if i not in stops]))
        text += model.tokenizer.token_bytes(token)
        Matcher.take([matcher], [[token]])
    else:
        pytest.fail(f"{text!r} never ends")
    jsonschema.validate(json.loads(text), schema)


def automata(matchers: list[Matcher]) -> int:
    return len({id(matcher._automaton) for matcher in matchers})


def test_answers_share_no_lock(model: qwen_jax.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have automata of their own, so many, which later ones use again; one that took long is
    not made twice."""
    monkeypatch.setattr(matching, "AUTOMATA", 3)
    monkeypatch.setattr(matching, "QUICK", 60.0)
    constraint = Constraint.regex("[a-z]{3,9}!")
    held = [Matcher(constraint, model.tokenizer) for _ in range(7)]
    assert automata(held) == 3 and automata(held[:3]) == 3
    used = {id(matcher._automaton) for matcher in held}
    del held
    again = [Matcher(constraint, model.tokenizer) for _ in range(3)]
    assert {id(matcher._automaton) for matcher in again} == used
    monkeypatch.setattr(matching, "QUICK", 0.0)
    slow = [Matcher(Constraint.regex("[a-z]{3,9}?"), model.tokenizer) for _ in range(3)]
    assert automata(slow) == 1


def test_who_failed_leaves_its_automaton(model: qwen_jax.Model) -> None:
    """An answer that llguidance gives up says so; the next of its form goes on from another."""
    constraint = Constraint.regex("[ab]{2}")
    failed, mask = Matcher(constraint, model.tokenizer), np.zeros((1, 64), np.uint32)
    (wrong,) = model.tokenizer.encode("!")
    Matcher.take([failed], [[wrong]])
    (why,) = Matcher.fill([failed], mask)
    assert why is not None and why.startswith("The constraint is too much: ")
    after = Matcher(constraint, model.tokenizer)
    assert after._automaton is not failed._automaton
    assert len(allowed(after)) > 0


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("width", [64, 67])
def test_masks_are_those_of_every_token_by_itself(
    model: qwen_jax.Model, threads: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many answers at once, on threads or none, wider than the vocabulary or not, into what is
    left of the last masks; against which single tokens re lets go on to a whole match."""
    monkeypatch.setattr(matching, "THREADS", threads)
    monkeypatch.setattr(matching, "AUTOMATA", threads)
    monkeypatch.setattr(matching, "FEW_WORDS", 0)
    monkeypatch.setattr(matching, "_executor", functools.cache(matching._executor.__wrapped__))
    rng, tokenizer = np.random.default_rng(threads), model.tokenizer
    patterns = [f"[ab]{{{most}}}" for most in range(1, 6)] * 4
    texts = [tokenizer.token_bytes(i) for i in range(2048)]
    held: list[Matcher | None] = [
        Matcher(Constraint.regex(pattern), tokenizer) for pattern in patterns
    ]
    held[7] = None
    written, masks = [""] * len(held), np.full((len(held), width), 0xFFFFFFFF, np.uint32)
    for _ in range(4):
        assert Matcher.fill(held, masks) == [None] * len(held)
        taken: list[tuple[Matcher, list[int]]] = []
        for row, (matcher, pattern) in enumerate(zip(held, patterns, strict=True)):
            bits = np.unpackbits(masks[row].view(np.uint8), bitorder="little")
            if matcher is None:
                assert bits.all()
                continue
            left = int(pattern[5:-1]) - len(written[row])
            found = set(np.flatnonzero(bits).tolist())
            if not left:
                assert found == set(tokenizer.stop_ids)
            else:
                fits = re.compile(f"[ab]{{1,{left}}}".encode())
                assert found == {i for i, text in enumerate(texts) if fits.fullmatch(text)}
                token = int(rng.choice(sorted(found)))
                written[row] += texts[token].decode()
                taken.append((matcher, [token]))
        if taken:
            Matcher.take(*zip(*taken, strict=True))


@pytest.mark.parametrize("bits, single", [([70], True), ([70, 71], False), ([3, 70], False)])
def test_tokens_are_known_only_behind_one_bit(bits: list[int], single: bool) -> None:
    """Of two tokens in one word of a mask, either may be chosen."""
    mask = np.zeros(9, np.uint32)
    for bit in bits:
        mask[bit // 32] |= np.uint32(1 << bit % 32)
    assert matching._is_single(mask) == single
