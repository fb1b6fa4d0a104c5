"""What must not be seen or touched: done rows, rows of no slot, padding, others' pages, ids that no
token has."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sample_tokens import settings
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Plan, Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.steps import NOT_LIVE, Extras, State
from qwen_jax.engine.texts import Text
from qwen_jax.model.cache import NOBODY
from tests.engines import (
    device_parameters,
    fill,
    forced,
    fresh_engine,
    generate,
    poison,
    rows_of,
    run_steps,
)
from tests.golden_cases import Case
from tests.test_engine import CONFIG, prompt


def test_a_done_row_changes_nothing() -> None:
    """Not its pages, token or counts; and its neighbour goes on."""
    engine, vocab = fresh_engine(CONFIG), CONFIG.vocab_size
    texts = [prompt(20, seed=1).tokens, prompt(10, seed=2).tokens]
    tables = fill(engine, texts, 50)
    tokens, starts = [3, 4], [20, 10]
    penalised = settings(2, frequency=0.5)
    first = rows_of(tokens, starts, limit=[3, 40], settings=penalised)
    later = first._replace(fresh=np.zeros(2, np.int32))
    plan, state, extras = Plan(True, 20), State.create(2), Extras.create(2, vocab)
    # Just done: one step more would already have written what later steps only write again.
    state, extras, _ = run_steps(engine, tables, state, extras, first, plan, 3)
    np.testing.assert_array_equal(state.done, [True, False])
    assert extras is not None
    before = [np.asarray(x[0]) for x in (*state, *extras.counts)]
    pages = np.asarray(engine.pages)
    state, extras, emitted = run_steps(engine, tables, state, extras, later, plan, 8)
    assert extras is not None
    for was, now in zip(before, (*state, *extras.counts), strict=True):
        np.testing.assert_array_equal(now[0], was)
    assert (np.asarray(emitted.token)[:, 0] == NOT_LIVE).all()
    assert (np.asarray(emitted.token)[:, 1] >= 0).all()
    np.testing.assert_array_equal(state.generated, [3, 11])
    np.testing.assert_array_equal(extras.counts.generated.sum(axis=1), [3, 11])
    # Of all pages only eight positions of the neighbour have changed, and the page of nobody.
    changed = (np.asarray(engine.pages) != pages).any(axis=(0, 2, 4))
    changed[NOBODY] = False
    where = np.argwhere(changed)
    assert where.tolist() == [[tables[1, 0], slot] for slot in range(13, 21)]


def test_a_row_that_is_not_live_takes_part_in_nothing() -> None:
    """As the rows that only make a call's size: their slots are no slot's."""
    engine = fresh_engine(CONFIG)
    tables = fill(engine, [prompt(20, seed=1).tokens], 50)
    rows = rows_of([3, 0], [20, 0], live=[1, 0], slot=[1, 2], limit=[9, 9])
    state = State(*(jnp.asarray(x) for x in ([5, 6], [1, 0], [False, True])))
    before = np.asarray(engine.pages)
    state, _, emitted = run_steps(
        engine, np.concatenate([tables, 0 * tables]), state, None, rows, Plan(), 4
    )
    np.testing.assert_array_equal(np.asarray(emitted.token)[:, 1], [NOT_LIVE] * 4)
    assert (int(state.token[0]), int(state.generated[0])) == (5, 1)
    assert int(state.generated[1]) == 4
    changed = (np.asarray(engine.pages) != before).any(axis=(0, 2, 4))
    assert {int(page) for page in np.argwhere(changed)[:, 0]} <= {NOBODY, int(tables[0, 0])}


# Two holes between tokens, and the rows behind the last one.
UNUSED = [7, 30, *range(52, 61)]


@functools.cache
def padded_engine() -> Engine:
    """50 tokens in use; the logits of the 11 rows without a token are by far the largest."""
    config = dataclasses.replace(CONFIG, tied=False)
    params = Case(config, 0).parameters()
    params["lm_head.weight"] = params["lm_head.weight"].copy()
    params["lm_head.weight"][UNUSED] *= 100
    weights = device_parameters(params, "float32")
    return Engine(config, weights, valid_tokens=52, unused_ids=UNUSED[:2])


@pytest.mark.parametrize("temperature", [0.0, 50.0])
def test_padded_vocabulary_rows_are_never_chosen(temperature: float) -> None:
    engine = padded_engine()
    samplings = [Sampling(temperature=temperature, seed=seed) for seed in range(8)]
    prompts = [prompt(12, 40, seed) for seed in range(8)]
    for logprobs in (False, True):  # greedy without them is chosen another way
        result = generate(engine, prompts, samplings, logprobs=logprobs)
        chosen = {token for text in result.tokens for token in text}
        assert chosen.isdisjoint(UNUSED)
        assert np.isfinite(result.logprobs).all()
        if temperature:
            assert len(chosen) == 50, "320 draws at this heat should meet every token in use"
    # The probabilities of tokens in use sum to one.
    tables = fill(engine, [prompts[0].tokens])
    (logprobs,) = forced(engine, tables, [5], [12]).astype(np.float64)
    assert np.isneginf(logprobs[UNUSED]).all()
    assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-5)


LEAKS = [prompt(20, 30, seed=1), prompt(17, 30, seed=3), prompt(530, 30, seed=2)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_in_the_cache_before_never_leaks(value: float) -> None:
    """Into pages that are taken, into their positions past a text's end, into nobody's page."""
    clean = generate(fresh_engine(CONFIG), LEAKS, logprobs=True)
    engine = fresh_engine(CONFIG)
    logits = engine.logits(LEAKS[2].tokens)
    engine.pages = jnp.full_like(engine.pages, value)
    assert generate(engine, LEAKS, logprobs=True) == clean
    engine.pages = jnp.full_like(engine.pages, value)
    np.testing.assert_array_equal(engine.logits(LEAKS[2].tokens), logits)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_texts_own_never_leaks(value: float) -> None:
    """All but the texts' own positions is overwritten between any two turns: what padding left,
    pages of others, and the page of nobody, which every call writes to."""
    clean = generate(fresh_engine(CONFIG), LEAKS)
    engine = fresh_engine(CONFIG)
    scheduler = Scheduler(engine)
    texts = [Text(p.tokens, p.max_tokens) for p in LEAKS]
    for text in texts:
        scheduler.add(text)
    got: dict[Text, list[int]] = {text: [] for text in texts}
    while not scheduler.idle:
        for news in scheduler.turn():
            got[news.text] += news.tokens
        there = [text for text in texts if text.pages]
        tables = np.zeros((len(there), engine.layout.table_width), np.int32)
        for row, text in enumerate(there):
            tables[row, : len(text.pages)] = text.pages
        # A prompt that is entering is left whole.
        poison(engine, tables, [text.entering + len(got[text]) for text in there], value)
    assert list(got.values()) == clean.tokens
