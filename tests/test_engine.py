"""Prompts in pieces and decode steps: batches, limits, stops, and what a done row leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Plan, Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.shapes import Shapes, pieces_of, shapes_for
from qwen_jax.engine.steps import Extras, State
from qwen_jax.engine.texts import Text
from qwen_jax.errors import UserError
from qwen_jax.model.cache import PAGE, Cache
from tests.engines import (
    Generated,
    Prompt,
    fill,
    forced,
    fresh_engine,
    generate,
    random_engine,
    random_tokens,
    relative,
    reshape,
    rows_of,
    run_steps,
    run_to_end,
)
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


# ---- Prompts in pieces

LENGTHS = [1, 2, 15, 16, 17, 96, 97, 127, 128, 129, 144, 255, 256, 257, 1024, LONGEST]


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_of_every_length_equal_float64(length: int) -> None:
    logits = random_engine(CONFIG).logits(prompt(LONGEST).tokens[:length])
    assert logits.shape == (length, CONFIG.vocab_size) and logits.dtype == np.float32
    assert relative(logits, exact()[:length]) <= BOUND
    assert relative(logits[-1], exact()[length - 1]) <= BOUND


def test_texts_of_every_length_that_begin_together_equal_float64() -> None:
    """More than there are slots, of 1 to 9 pages; pages of the longer ones are shared."""
    vocab = CONFIG.vocab_size
    texts = [Text(prompt(LONGEST).tokens[:length], 1, top=vocab) for length in LENGTHS]
    engine = fresh_engine(CONFIG)
    told = {news.text: news for news in run_to_end(engine, texts)}
    for text, length in zip(texts, LENGTHS, strict=True):
        assert told[text].logprobs is not None
        ((_, top),) = told[text].logprobs
        ours = np.empty(vocab)
        ours[[token for token, _ in top]] = [logprob for _, logprob in top]
        assert relative(ours, log_softmax(exact()[length - 1])) <= BOUND
    assert engine.pool.available == engine.pool.size


@pytest.mark.parametrize("length", [63, 64, 65, 130, 300])
@pytest.mark.parametrize("lengths", [(32, PAGE), (64, PAGE), (PAGE,)], ids=str)
def test_the_pieces_do_not_change_the_text(lengths: tuple[int, ...], length: int) -> None:
    engine = fresh_engine(CONFIG)
    reshape(engine, lengths=lengths)
    logits = engine.logits(prompt(LONGEST).tokens[:length])
    assert relative(logits, exact()[:length]) <= BOUND


def test_pieces() -> None:
    cpu = shapes_for("cpu")

    def padded(start: int, stop: int) -> list[int]:
        return [piece.padded for piece in pieces_of(start, stop, cpu)]

    assert padded(0, 0) == padded(128, 128) == []
    assert padded(0, 1) == padded(0, 16) == padded(128, 130) == [16]
    assert padded(0, 17) == [16, 16]
    assert padded(0, 96) == [16] * 6
    assert padded(0, 97) == padded(0, 128) == [128]
    assert padded(0, 257) == [128, 128, 16]
    assert padded(128, 257) == [128, 16]
    # Short ones come together, and a page alone.
    assert cpu.sizes(16) == (1, 4, 16)
    assert cpu.sizes(128) == (1,)
    assert cpu.extends([4]) == {(16, 4), (128, 1)}
    assert shapes_for("gpu").sizes(64) == (4, 32)
    invariant = shapes_for("cpu", batch_invariant=True)
    assert (invariant.sizes(16), invariant.sizes(128)) == ((16,), (1,))


@given(
    start=st.integers(0, 20),
    tokens=st.integers(0, 5000),
    shapes=st.sampled_from([shapes_for("cpu"), shapes_for("gpu")]),
)
def test_pieces_hold_the_prompt_and_lie_in_one_page(
    start: int, tokens: int, shapes: Shapes
) -> None:
    at = start * PAGE
    for piece in pieces_of(start * PAGE, start * PAGE + tokens, shapes):
        assert piece.start == at
        assert 0 < piece.length <= piece.padded in shapes.lengths
        assert piece.start // PAGE == (piece.start + piece.length - 1) // PAGE
        # Padding may go past a page: it is written nowhere. But a full page is always cut alike, so
        # that its numbers are the same in every text that shares it.
        if (at := piece.start + piece.length) % PAGE == 0:
            assert piece.length == shapes.lengths[-1]
    assert at == start * PAGE + tokens


# ---- Batches

SHAPES = [(1, 30), (16, 12), (33, 30), (64, 1), (64, 25), (200, 20)]


def test_a_batch_gives_what_each_row_gives_alone() -> None:
    """Greedy rows and rows that draw, in turn. Alone a row takes the steps of one row."""
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


def test_steps_in_calls_of_some_or_one_by_one_are_the_same() -> None:
    def tokens(steps: int) -> list[list[int]]:
        engine = fresh_engine(CONFIG)
        reshape(engine, steps=steps)
        return generate(engine, PAIR, DRAWN_AND_PENALISED).tokens

    assert tokens(1) == tokens(4)


def test_working_ahead_changes_nothing() -> None:
    ahead = fresh_engine(CONFIG)
    reshape(ahead, ahead=True)
    results = [
        generate(e, PAIR, DRAWN_AND_PENALISED, logprobs=True) for e in (ahead, fresh_engine(CONFIG))
    ]
    assert results[0] == results[1]


def test_the_same_call_twice_is_the_same_bit_for_bit() -> None:
    engines = fresh_engine(CONFIG), fresh_engine(CONFIG)
    first, second = (generate(e, PAIR, DRAWN_AND_PENALISED, logprobs=True) for e in engines)
    assert first == second
    np.testing.assert_array_equal(engines[0].pages, engines[1].pages)


# ---- Limits

EDGE = odd_config(num_layers=2, context_length=256)
"""A context of two pages."""


def run_one(engine: Engine, text: Text) -> tuple[list[int], np.ndarray]:
    """A text's tokens, and the table it had."""
    scheduler, tokens = Scheduler(engine), []
    table = np.zeros((1, engine.layout.table_width), np.int32)
    scheduler.add(text)
    while not scheduler.idle:
        tokens += [token for news in scheduler.turn() for token in news.tokens]
        if text.pages:
            table[0, : len(text.pages)] = text.pages
    return tokens, table


@pytest.mark.parametrize("most", [56, 1000])
def test_a_text_that_fills_the_context(most: int) -> None:
    """200 + 56 = 256: all are generated, and every position holds what a fresh prompt puts there;
    the last token never enters."""
    engine, asked = fresh_engine(EDGE), random_tokens(EDGE, 200)
    tokens, table = run_one(engine, Text(asked, engine.room(asked, most)))
    assert len(tokens) == 56
    whole = [*asked, *tokens[:-1]]
    ours, other = Cache(engine.pages, table), fresh_engine(EDGE)
    tables = fill(other, [whole])
    fresh = Cache(other.pages, tables)
    for layer in range(EDGE.num_layers):
        for x, y in zip(ours.layer(layer), fresh.layer(layer), strict=True):
            for position in range(255):
                assert relative(x[0, :, position], y[0, :, position]) <= 2 * BOUND, position
            assert not np.asarray(x[0, :, 255]).any()
    assert int(engine.logits(whole)[-1].argmax()) == tokens[-1]


@pytest.mark.parametrize("length", [255, 240, 17])
def test_the_last_room_in_the_context(length: int) -> None:
    engine = random_engine(EDGE)
    tokens = generate(engine, [Prompt(random_tokens(EDGE, length), 10_000)]).tokens[0]
    assert len(tokens) == 256 - length


@pytest.mark.parametrize("most", [0, 1, 2, 3, 4, 5, 9])
def test_max_tokens_are_generated_and_no_more(most: int) -> None:
    """Whatever call they end in; none asked for gives none."""
    result = generate(random_engine(CONFIG), [prompt(20, most), prompt(5, 9)])
    assert [len(text) for text in result.tokens] == [most, 9]


def test_impossible_prompts_are_refused() -> None:
    engine = random_engine(EDGE)

    def refusal(length: int) -> str:
        with pytest.raises(UserError) as caught:
            engine.room(random_tokens(EDGE, length), 5)
        return str(caught.value)

    assert "prompt is empty" in refusal(0)
    assert "256 tokens" in refusal(256) and "context of 256" in refusal(256)
    assert "1000 tokens" in refusal(1000)
    for tokens in ([0, EDGE.vocab_size], [0, -1]):
        with pytest.raises(UserError, match="tokens 0 to 60"):
            engine.room(tokens, 5)
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
    assert generate(engine, prompts).tokens == [free[0][:end], free[1]]


def test_a_first_token_that_stops() -> None:
    prompts = [prompt(20, 40, seed=1)]
    first = generate(random_engine(CONFIG), prompts).tokens[0][0]
    result = generate(random_engine(CONFIG, stop_ids=(first,)), prompts)
    assert result.tokens == [[first]]


# ---- Buffers


def test_what_a_call_is_given_to_write_is_donated() -> None:
    engine = fresh_engine(CONFIG)
    before = engine.pages
    tables = fill(engine, [[1, 2, 3]])
    pages, state, extras = engine.pages, State.create(1), Extras.create(1, CONFIG.vocab_size)
    assert before.is_deleted()
    rows = rows_of([4], [3])
    after = run_steps(engine, tables, state, extras, rows, Plan(True, 20), 4)
    given = jax.tree.leaves((pages, state, extras.counts))
    assert all(x.is_deleted() for x in given)
    assert not any(x.is_deleted() for x in jax.tree.leaves((engine.pages, after)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_of_a_run(dtype: str) -> None:
    """The cache has the parameters' dtype; log-probabilities are float32."""
    engine = random_engine(CONFIG, dtype=dtype)
    result: Generated = generate(engine, [prompt(20, 10)], logprobs=True)
    assert engine.pages.dtype == jnp.dtype(dtype)
    assert len(result.tokens[0]) == 10 and np.isfinite(result.logprobs).all()
    assert forced(engine, fill(engine, [[1]]), [2], [1]).dtype == np.float32


def test_a_pool_that_a_failed_call_took_along_is_made_anew() -> None:
    """As after an interrupt between a call and keeping what it returned."""
    engine = fresh_engine(CONFIG, cache_tokens=1024)
    text = prompt(300, 10)
    first = generate(engine, [text], logprobs=True)
    engine.pages.delete()
    assert generate(engine, [text], logprobs=True) == first
    assert engine.pool.available == engine.pool.size
