"""Prefill and decoding: chunks, batches, limits, stops, and what a finished row leaves alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.engine import engine as engine_module
from qwen_jax.engine.engine import Engine, Prompt, Rows
from qwen_jax.engine.sampling import Sampling, plan_rows
from qwen_jax.errors import UserError
from qwen_jax.model.cache import KVCache
from tests.engines import device_parameters, generate, random_engine, random_tokens, relative
from tests.golden_cases import Case, odd_config
from tests.numpy_reference import forward, log_softmax

BOUND = 1e-5
"""Relative error of float32 logits, as in test_parity."""

CONFIG = odd_config(num_layers=2, context_length=2048)
LONGEST = 1100


def prompt(length: int, max_tokens: int = 1, seed: int = 0) -> Prompt:
    return Prompt(random_tokens(CONFIG, length, seed), max_tokens)


@functools.cache
def exact() -> np.ndarray:
    """float64 logits of one text of LONGEST tokens; those of its beginnings are their rows."""
    return forward(CONFIG, Case(CONFIG, 0).parameters(), prompt(LONGEST).tokens)["logits"]


def row_state(rows: Rows, row: int) -> Any:
    """Everything a row is, on the host."""
    return jax.tree.map(lambda x: np.asarray(x[row]), rows)


def assert_equal(ours: Any, theirs: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# ---- Prefill in chunks

LENGTHS = [1, 2, 15, 16, 17, 511, 512, 513, 1024, LONGEST]


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_of_every_length_equal_float64(length: int) -> None:
    logits = random_engine(CONFIG).logits(prompt(LONGEST).tokens[:length])
    assert logits.shape == (length, CONFIG.vocab_size) and logits.dtype == np.float32
    assert relative(logits, exact()[:length]) <= BOUND
    assert relative(logits[-1], exact()[length - 1]) <= BOUND


def test_prefill_of_every_length_in_one_batch_equals_float64() -> None:
    """Rows that end in earlier chunks than the longest keep the state they ended with."""
    prompts = [Prompt(prompt(LONGEST).tokens[:length], 1) for length in LENGTHS]
    vocab = CONFIG.vocab_size
    plan, params = plan_rows([Sampling()] * len(prompts), vocab, top_logprobs=vocab)
    _, first = random_engine(CONFIG).prefill(prompts, plan, params)
    for row, length in enumerate(LENGTHS):
        ours = np.empty(vocab)
        likeliest = first.choice.logprobs
        ours[np.asarray(likeliest.top_ids[row])] = likeliest.top[row]
        assert relative(ours, log_softmax(exact()[length - 1])) <= BOUND


@pytest.mark.parametrize(
    ("chunk", "length"), [(16, 65), (32, 63), (32, 64), (64, 64), (64, 65), (64, 129)]
)
def test_chunks_do_not_change_the_text(
    monkeypatch: pytest.MonkeyPatch, chunk: int, length: int
) -> None:
    monkeypatch.setattr(engine_module, "CHUNK", chunk)
    logits = random_engine(CONFIG).logits(prompt(LONGEST).tokens[:length])
    assert relative(logits, exact()[:length]) <= BOUND


def test_chunk_lengths() -> None:
    lengths = functools.partial(engine_module.chunk_lengths, chunk=512)
    assert lengths(1) == lengths(16) == [16]
    assert lengths(17) == [32]
    assert lengths(257) == lengths(512) == [512]
    assert lengths(513) == [512, 16]
    assert lengths(1100) == [512, 512, 128]


@given(longest=st.integers(1, 40_000), chunk=st.sampled_from([512, 1024, 2048]))
def test_chunks_hold_the_prompt_and_fit_its_cache(longest: int, chunk: int) -> None:
    lengths = engine_module.chunk_lengths(longest, chunk)
    assert longest <= sum(lengths) <= engine_module.bucket(longest, 16)
    assert sum(lengths[:-1]) < longest
    assert lengths == sorted(lengths, reverse=True)
    assert all(length in (16, 32, 64, 128, 256, 512, 1024, 2048) for length in lengths)
    assert max(lengths) <= chunk


# ---- Batches

SHAPES = [(1, 30), (16, 12), (33, 30), (64, 1), (64, 25)]


def test_a_batch_gives_what_each_row_gives_alone() -> None:
    """Greedy rows and rows that draw, in turn."""
    prompts = [prompt(length, most, seed=length) for length, most in SHAPES]
    samplings = [
        Sampling(temperature=0.9 * (i % 2), top_p=0.95, seed=i) for i in range(len(SHAPES))
    ]
    engine = random_engine(CONFIG)
    together = generate(engine, prompts, samplings, logprobs=True)
    for row, (one, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        alone = generate(engine, [one], [sampling], logprobs=True)
        assert together.tokens[row] == alone.tokens[0]
        assert len(alone.tokens[0]) == one.max_tokens
        np.testing.assert_allclose(together.logprobs[row], alone.logprobs[0], atol=2e-5)
    assert len({tuple(text) for text in together.tokens}) == len(SHAPES)


PAIR = [prompt(20, 24, seed=1), prompt(30, 10, seed=2)]
DRAWN_AND_PENALISED = [Sampling(temperature=1.0, seed=3), Sampling(repetition_penalty=1.1)]


def test_penalties_of_one_row_leave_the_others_alone() -> None:
    plain = generate(random_engine(CONFIG), PAIR).tokens
    penalised = [Sampling(repetition_penalty=1.5, frequency_penalty=0.5), Sampling()]
    tokens = generate(random_engine(CONFIG), PAIR, penalised).tokens
    assert tokens[1] == plain[1]
    assert len(set(tokens[0])) > len(set(plain[0])), "penalties make a text more varied"


def test_steps_in_chunks_or_one_by_one_are_the_same() -> None:
    engine = random_engine(CONFIG)
    one = generate(engine, PAIR, DRAWN_AND_PENALISED, chunk=1)
    eight = generate(engine, PAIR, DRAWN_AND_PENALISED, chunk=8)
    assert one.tokens == eight.tokens


def test_the_same_call_twice_is_the_same_bit_for_bit() -> None:
    first, second = (generate(random_engine(CONFIG), PAIR, DRAWN_AND_PENALISED) for _ in range(2))
    assert first.tokens == second.tokens
    assert_equal(first.rows, second.rows)


# ---- Limits

EDGE = odd_config(num_layers=2, context_length=256)
"""A context that its cache holds exactly: SMALLEST_CAPACITY slots."""


@pytest.mark.parametrize("most", [56, 1000])
def test_a_text_that_fills_the_context(most: int) -> None:
    """200 + 56 = 256: all are generated, and every slot holds what a fresh prefill puts there."""
    engine = random_engine(EDGE)
    prompts = [Prompt(random_tokens(EDGE, 200), most), Prompt(random_tokens(EDGE, 9), 20)]
    tokens, _, rows = generate(engine, prompts, chunk=16)
    assert [len(text) for text in tokens] == [56, 20]
    assert rows.cache.capacity == 256
    np.testing.assert_array_equal(rows.length, [255, 28])  # the last token never enters

    whole = [*prompts[0].tokens, *tokens[0][:-1]]
    assert_same_slots(rows.cache, filled_cache(engine, whole), 255)
    assert int(engine.logits(whole)[-1].argmax()) == tokens[0][-1]


def filled_cache(engine: Engine, tokens: list[int]) -> KVCache:
    plan, params = plan_rows([Sampling()], engine.config.vocab_size)
    return engine.prefill([Prompt(tokens, 1)], plan, params)[0].cache


def assert_same_slots(ours: KVCache, fresh: KVCache, slots: int) -> None:
    for x, y in zip((*ours.k, *ours.v), (*fresh.k, *fresh.v), strict=True):
        a, b = np.asarray(x), np.asarray(y)
        for slot in range(slots):
            assert relative(a[0, :, slot], b[0, :, slot]) <= 2 * BOUND, f"slot {slot}"


@pytest.mark.parametrize("length", [255, 240, 17])
def test_the_last_room_in_the_context(length: int) -> None:
    engine = random_engine(EDGE)
    tokens = generate(engine, [Prompt(random_tokens(EDGE, length), 10_000)]).tokens[0]
    assert len(tokens) == 256 - length


@pytest.mark.parametrize("most", [0, 1, 2, 7, 8, 9, 17])
def test_max_tokens_are_generated_and_no_more(most: int) -> None:
    """Whatever chunk they end in; none asked for gives none."""
    result = generate(random_engine(CONFIG), [prompt(20, most), prompt(5, 9)], chunk=8)
    assert [len(text) for text in result.tokens] == [most, 9]


def test_impossible_prompts_are_refused() -> None:
    engine = random_engine(EDGE)
    plan, params = plan_rows([Sampling()] * 2, EDGE.vocab_size)

    def refusal(length: int) -> str:
        fine = Prompt(random_tokens(EDGE, 5), 5)
        with pytest.raises(UserError) as caught:
            engine.prefill([fine, Prompt(random_tokens(EDGE, length), 5)], plan, params)
        return str(caught.value)

    assert "prompt is empty" in refusal(0)
    assert "256 tokens" in refusal(256) and "context of 256" in refusal(256)
    assert "1000 tokens" in refusal(1000)
    for tokens in ([0, EDGE.vocab_size], [0, -1]):
        with pytest.raises(UserError, match="tokens 0 to 60"):
            engine.prefill([Prompt(tokens, 5)], plan, params)
    with pytest.raises(UserError, match="no prompts"):
        engine.prefill([], plan, params)
    for length in (0, 257):
        with pytest.raises(UserError, match=f"1 to 256 tokens.*got {length}"):
            engine.logits(random_tokens(EDGE, length))
    assert engine.logits(random_tokens(EDGE, 256)).shape == (256, EDGE.vocab_size)


# ---- Stops


def test_a_stop_token_ends_its_row_and_no_other() -> None:
    prompts = [prompt(20, 40, seed=1), prompt(30, 40, seed=2)]
    free = generate(random_engine(CONFIG), prompts).tokens
    stop = next(t for t in free[0][5:] if t not in free[1] and t not in free[0][:5])
    end = free[0].index(stop) + 1
    unused = next(t for t in range(CONFIG.vocab_size) if t not in free[0] + free[1])
    engine = random_engine(CONFIG, stop_ids=(unused, stop))
    tokens = generate(engine, prompts, chunk=4).tokens
    assert tokens == [free[0][:end], free[1]]


def test_a_first_token_that_stops() -> None:
    prompts = [prompt(20, 40, seed=1)]
    first = generate(random_engine(CONFIG), prompts).tokens[0][0]
    result = generate(random_engine(CONFIG, stop_ids=(first,)), prompts)
    assert result.tokens == [[first]]


def test_a_done_row_changes_nothing() -> None:
    """Not its cache, length, token or counts; and its neighbour goes on as if alone."""
    prompts = [prompt(20, 3, seed=1), prompt(10, 40, seed=2)]
    samplings = [Sampling(frequency_penalty=0.5)] * 2
    engine = random_engine(CONFIG)
    plan, params = plan_rows(samplings, CONFIG.vocab_size)
    rows, _ = engine.prefill(prompts, plan, params)
    # Just done: one step more would already have written what later steps only write again.
    rows, _ = engine.decode_many(rows, params, plan, 2)
    np.testing.assert_array_equal(rows.done, [True, False])
    before, growing = row_state(rows, 0), int(rows.length[1])
    rows, emitted = engine.decode_many(rows, params, plan, 8)
    assert_equal(row_state(rows, 0), before)
    assert not np.asarray(emitted.live[:, 0]).any() and np.asarray(emitted.live[:, 1]).all()
    assert int(rows.length[1]) == growing + 8
    assert int(rows.counts.generated[0].sum()) == 3 and int(before.generated) == 3


# ---- What is not there


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
    engine, vocab = padded_engine(), CONFIG.vocab_size
    samplings = [Sampling(temperature=temperature, seed=seed) for seed in range(8)]
    prompts = [prompt(12, 40, seed) for seed in range(8)]
    result = generate(engine, prompts, samplings, logprobs=True)
    chosen = {token for text in result.tokens for token in text}
    assert chosen.isdisjoint(UNUSED)
    assert np.isfinite(result.logprobs).all()
    if temperature:
        assert len(chosen) == 50, "320 draws at this heat should meet every token in use"
    # The probabilities of tokens in use sum to one.
    plan, columns = plan_rows(samplings[:1], vocab, top_logprobs=vocab)
    _, first = engine.prefill(prompts[:1], plan, columns)
    logprobs = np.asarray(first.choice.logprobs.top[0], np.float64)
    assert np.isneginf(logprobs[-len(UNUSED) :]).all()  # the likeliest come first
    assert np.exp(logprobs).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_unused_cache_slots_never_leak(monkeypatch: pytest.MonkeyPatch, poison: float) -> None:
    prompts = [prompt(20, 30, seed=1), prompt(530, 30, seed=2)]
    engine = random_engine(CONFIG)
    clean = generate(engine, prompts, logprobs=True)
    logits = engine.logits(prompts[1].tokens)

    def poisoned(rows: int, capacity: int) -> KVCache:
        cache = KVCache.create(CONFIG, rows, capacity, jnp.dtype(jnp.float32))
        return jax.tree.map(lambda x: jnp.full_like(x, poison), cache)

    monkeypatch.setattr(engine, "create_cache", poisoned)
    dirty = generate(engine, prompts, logprobs=True)
    assert dirty.tokens == clean.tokens and dirty.logprobs == clean.logprobs
    np.testing.assert_array_equal(engine.logits(prompts[1].tokens), logits)


def test_what_a_prompt_was_padded_with_never_leaks() -> None:
    """Prefill leaves padding's keys and values past a row's length; decoding must not see them."""
    prompts = [prompt(17, 30, seed=1), prompt(30, 30, seed=2)]
    engine = random_engine(CONFIG)
    clean = generate(engine, prompts)
    plan, params = plan_rows([Sampling()] * 2, CONFIG.vocab_size)
    rows, first = engine.prefill(prompts, plan, params)
    past = np.arange(rows.cache.capacity) >= np.asarray(rows.length)[:, None]
    cache = jax.tree.map(lambda x: jnp.where(past[:, None, :, None], jnp.nan, x), rows.cache)
    rows, emitted = engine.decode_many(dataclasses.replace(rows, cache=cache), params, plan, 29)
    tokens = np.concatenate([np.asarray(first.choice.token)[None], emitted.choice.token])
    assert tokens.T.tolist() == clean.tokens


# ---- Buffers


def test_the_rows_passed_in_are_donated() -> None:
    engine = random_engine(CONFIG)
    plan, params = plan_rows([Sampling()], CONFIG.vocab_size)
    rows, _ = engine.prefill([prompt(20, 30)], plan, params)
    after, _ = engine.decode_many(rows, params, plan, 4)
    assert all(x.is_deleted() for x in (*rows.cache.k, *rows.cache.v))
    assert not any(x.is_deleted() for x in jax.tree.leaves(after))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_of_a_run(dtype: str) -> None:
    """The cache has the parameters' dtype; log-probabilities are float32."""
    result = generate(random_engine(CONFIG, dtype=dtype), [prompt(20, 10)], logprobs=True)
    assert {x.dtype for x in (*result.rows.cache.k, *result.rows.cache.v)} == {jnp.dtype(dtype)}
    assert len(result.tokens[0]) == 10 and np.isfinite(result.logprobs).all()
