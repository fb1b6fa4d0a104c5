"""From token ids to text: pieces, stops, limits, chunks and looking ahead, on scripted engines.

A scripted engine chooses what it is told to, so what should come out can be worked out from the
whole list of tokens at once, which `expected` does.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qwen_jax import api
from qwen_jax.engine.engine import Emitted, Prompt
from qwen_jax.engine.sampling import Choice, Logprobs, Sampling
from qwen_jax.errors import UserError
from qwen_jax.generation import Batch, Completion, Request, Timings
from qwen_jax.text.tokenizer import Tokenizer
from tests.tiny_checkpoints import tiny_config

CONTEXT = 64
TOKENIZER: Tokenizer = api.load().tokenizer
(STOP, *_) = TOKENIZER.stop_ids


@dataclasses.dataclass(frozen=True)
class State:
    step: int
    done: Any


class Scripted:
    """An engine that chooses the tokens of a script, one list a row."""

    def __init__(self, scripts: Sequence[Sequence[int]], platform: str = "cpu") -> None:
        self.config = tiny_config(vocab_size=TOKENIZER.vocab_size, context_length=CONTEXT)
        self.cache_dtype = jnp.dtype(jnp.float32)
        self.platform = platform
        self.stop_ids = TOKENIZER.stop_ids
        # What is chosen after the end of a script must never be looked at.
        self._scripts = [[*script, *[7] * CONTEXT * 3] for script in scripts]
        self.done_at: list[np.ndarray] = []

    def capacity(self, prompts: Sequence[Prompt]) -> int:
        return CONTEXT

    def fuses(self, rows: int) -> bool:
        return False

    def prefill(self, prompts: Sequence[Prompt], *_: object) -> tuple[State, Emitted]:
        self._limits = np.array(
            [min(p.max_tokens, CONTEXT - len(p.tokens)) for p in prompts], np.int64
        )
        state, emitted = self._steps(State(0, self._limits <= 0), 1)
        return state, jax.tree.map(lambda x: x[0], emitted)

    def decode_many(self, state: State, _: object, __: object, steps: int) -> tuple[State, Emitted]:
        self.done_at.append(np.asarray(state.done))
        return self._steps(state, steps)

    def _steps(self, state: State, steps: int) -> tuple[State, Emitted]:
        done, live, tokens = np.array(state.done), [], []
        for step in range(state.step, state.step + steps):
            live.append(~done)
            tokens.append(np.array([script[step] for script in self._scripts]))
            done |= np.isin(tokens[-1], self.stop_ids) | (step + 1 >= self._limits)
        token = np.array(tokens)
        top = np.stack([token, token + 1], axis=-1)
        fine = np.ones(np.shape(token), bool)
        choice = Choice(token, ~fine, fine, Logprobs(-1.0 - token, top, -1.0 - top))
        emitted = Emitted(choice, np.array(live))
        return State(state.step + steps, done), emitted


def batch(
    scripts: Sequence[Sequence[int]],
    requests: Sequence[Request],
    *,
    chunk: int = 4,
    platform: str = "cpu",
    top_logprobs: int | None = None,
) -> tuple[Batch, Scripted]:
    engine = Scripted(scripts, platform)
    made = Batch(engine, TOKENIZER, requests, chunk=chunk, top_logprobs=top_logprobs)  # type: ignore[arg-type]
    return made, engine


def expected(script: Sequence[int], request: Request) -> tuple[str, tuple[int, ...], str]:
    """Text, tokens and reason of one row, from all its tokens at once."""
    limit = min(request.max_tokens, CONTEXT - len(request.tokens))
    ends = {*TOKENIZER.stop_ids, *request.stop_ids}
    stops = [stop.encode() for stop in request.stop]
    tokens, text, shown, hits = [], b"", b"", []
    for token in [*script, *[7] * CONTEXT][:limit]:
        content = TOKENIZER.token_bytes(token)
        is_shown = TOKENIZER.decode([token]) != "" and token not in ends
        tokens.append(token)
        text, shown = text + content, shown + bytes([is_shown]) * len(content)
        hits = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        if hits or token in ends:
            break
    end = min(hits)[1] if hits else len(text)
    seen = bytes(itertools.compress(text[:end], shown))
    ended = hits or (tokens and tokens[-1] in ends)
    return seen.decode(errors="replace"), tuple(tokens), "stop" if ended else "length"


def collect(made: Batch) -> list[str]:
    pieces = list(made)
    return ["".join(row) for row in zip(*pieces, strict=True)]


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


requests = st.builds(
    Request,
    tokens=st.lists(st.just(5), min_size=1, max_size=CONTEXT - 1),
    max_tokens=st.integers(0, 2 * CONTEXT),
    stop=st.lists(
        st.lists(st.sampled_from(["a", "b", " ", "\n", "é", "<|im_start|>", "<|", "rt|>"]))
        .map("".join)
        .filter(bool),
        max_size=2,
    ),
    stop_ids=st.lists(st.sampled_from(tokens_of("a b<|im_start|>")), max_size=2),
)
scripts = st.lists(
    st.sampled_from([*tokens_of("a b\nab é🦊 aab<|im_start|>"), STOP]) | st.integers(0, 2047),
    max_size=30,
)


@given(
    st.lists(st.tuples(scripts, requests), min_size=1, max_size=4),
    st.integers(1, 9),
    st.sampled_from(["cpu", "gpu"]),
)
@hypothesis_settings(max_examples=200)
def test_every_script_gives_its_text(
    rows: list[tuple[list[int], Request]], chunk: int, platform: str
) -> None:
    lists, asked = [script for script, _ in rows], [request for _, request in rows]
    made, _ = batch(lists, asked, chunk=chunk, platform=platform)
    texts = collect(made)
    for row, completion, text in zip(rows, made.completions, texts, strict=True):
        assert (completion.text, completion.tokens, completion.finish_reason) == expected(*row)
        assert text == completion.text
        assert completion.prompt_tokens == len(row[1].tokens)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_pieces_come_chunk_by_chunk_in_whole_characters(platform: str) -> None:
    script = tokens_of("é🦊é🦊")
    assert len(script) > 8, "each character must be several tokens for this test"
    made, _ = batch([[*script, STOP]], [Request([1], CONTEXT)], chunk=1, platform=platform)
    pieces = [piece for (piece,) in made]
    assert "".join(pieces) == "é🦊é🦊"
    # The stop token's, and the chunk that was under way meanwhile.
    assert len(pieces) == len(script) + 1 + (platform == "gpu")
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_a_character_cut_by_the_limit_is_shown_as_replaced(chunk: int) -> None:
    script = tokens_of("a🦊")
    made, _ = batch([script], [Request([1], len(script) - 1)], chunk=chunk)
    assert collect(made) == ["a\ufffd"]


def test_stop_strings_across_every_boundary() -> None:
    text = "the old pond\na frog leaps in\nthe sound of water"
    script = tokens_of(text)
    at = 0
    for token in script[:-1]:
        at += len(TOKENIZER.decode([token]))
        stop = text[at - 1 : at + 1]
        made, _ = batch([[*script, STOP]], [Request([1], CONTEXT, stop=[stop])])
        (shown,) = collect(made)
        assert shown == text[: text.index(stop)]
        (completion,) = made.completions
        assert completion.finish_reason == "stop"
        assert stop in TOKENIZER.decode(completion.tokens)
        assert stop not in TOKENIZER.decode(completion.tokens[:-1])


class TestWork:
    """How much is asked of the device."""

    long = Request([1], 30)

    @pytest.mark.parametrize(("platform", "chunks"), [("cpu", 3), ("gpu", 4)])
    def test_looks_one_chunk_ahead_on_an_accelerator(self, platform: str, chunks: int) -> None:
        made, engine = batch([[9] * 10 + [STOP]], [self.long], platform=platform)
        collect(made)
        assert len(made.completions[0].tokens) == 11
        assert len(engine.done_at) == chunks

    def test_no_chunk_is_asked_for_after_the_last_token(self) -> None:
        for platform in ("cpu", "gpu"):
            made, engine = batch([[9] * 99], [dataclasses.replace(self.long, max_tokens=5)])
            collect(made)
            assert len(engine.done_at) == 1, platform
            made, engine = batch([[9] * 99], [dataclasses.replace(self.long, max_tokens=1)])
            collect(made)
            assert len(engine.done_at) == 0, platform

    def test_the_context_bounds_the_chunks(self) -> None:
        made, engine = batch([[9] * 999], [Request([1] * 60, 10**20)], platform="gpu")
        collect(made)
        assert len(engine.done_at) == 1
        assert made.completions[0].finish_reason == "length"
        assert len(made.completions[0].tokens) == 4

    def test_a_row_ended_by_a_stop_string_is_done_on_the_device(self) -> None:
        letters = [token for letter in "aabbab" for token in tokens_of(letter)]
        rows = [Request([1], 12, stop=["bb"]), Request([1], 12)]
        made, engine = batch([letters, letters * 2], rows, chunk=2)
        collect(made)
        assert [list(done) for done in engine.done_at[:3]] == [
            [False, False],
            [False, False],
            [True, False],
        ]

    def test_an_idle_row_costs_no_step(self) -> None:
        made, engine = batch([[9]], [Request([1], 0)])
        assert collect(made) == [""]
        assert made.completions[0].finish_reason == "length"
        assert made.completions[0].tokens == () and not engine.done_at


def test_logprobs_are_those_of_the_chosen_tokens() -> None:
    made, _ = batch([[5, 6, STOP]], [Request([1], 9)], top_logprobs=2)
    collect(made)
    entries = made.completions[0].logprobs
    assert entries is not None and [e.token for e in entries] == [5, 6, STOP]
    for entry in entries:
        t = entry.token
        assert entry.logprob == -1.0 - t and entry.top == ((t, -1.0 - t), (t + 1, -2.0 - t))


def test_what_there_is_of_an_unfinished_row() -> None:
    script = tokens_of("one two three four five six seven eight")
    made, _ = batch([script], [Request([1], CONTEXT)], chunk=2)
    assert made.timings.prompt_seconds == made.timings.generation_rate == 0
    running = iter(made)
    seen = next(running)[0] + next(running)[0]
    (completion,) = made.completions
    assert (completion.text, completion.finish_reason) == (seen, "interrupted")
    assert completion.tokens == tuple(script[:3])
    assert made.timings.generated_tokens == 2


def test_a_batch_runs_once() -> None:
    made, _ = batch([[STOP]], [Request([1], 3)])
    collect(made)
    with pytest.raises(RuntimeError, match="runs once"):
        collect(made)


@pytest.mark.parametrize("top", [-1, TOKENIZER.vocab_size + 1])
def test_top_logprobs_out_of_range(top: int) -> None:
    with pytest.raises(UserError, match=f"top_logprobs is {top}, .* 2048 tokens"):
        batch([[1]], [Request([1])], top_logprobs=top)


def test_wrong_requests() -> None:
    with pytest.raises(UserError, match="max_tokens is -1"):
        Request([1], max_tokens=-1)
    with pytest.raises(UserError, match="stop is 'abc'"):
        batch([[1]], [Request([1], stop="abc")])
    with pytest.raises(UserError, match=r"stop is .*not valid Unicode"):
        batch([[1]], [Request([1], stop=["a\ud800"])])
    for wrong in (-1, TOKENIZER.vocab_size, True, "13"):
        with pytest.raises(UserError, match=f"stop_ids holds {wrong!r}, but .* 0 to 2047"):
            batch([[1]], [Request([1], stop_ids=[wrong])])  # type: ignore[list-item]
    batch([[1]], [Request([1], stop_ids=[np.int32(13)])])
    with pytest.raises(UserError, match="names token 2048"):
        batch([[1]], [Request([1], sampling=Sampling(logit_bias={2048: 1.0}))])


@pytest.fixture(scope="module")
def model() -> api.Model:
    return api.load()


@pytest.fixture(scope="module")
def asked(model: api.Model) -> list[Request]:
    hot = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=4)
    return [
        model.request("Write a haiku about rivers."),
        model.request("Write a haiku about the moon.", sampling=hot),
        model.request("haiku: snow", max_tokens=7),
        model.request("Write a haiku about a fern.", stop=["n a", "\n"]),
    ]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_chunks_and_looking_ahead_change_nothing(
    model: api.Model,
    asked: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    platform: str,
) -> None:
    def completions(chunk: int, platform: str) -> list[Completion]:
        monkeypatch.setattr(model.engine, "platform", platform)
        made = Batch(model.engine, model.tokenizer, asked, chunk=chunk, top_logprobs=2)
        texts = collect(made)
        assert texts == [completion.text for completion in made.completions]
        return made.completions

    got, reference = completions(chunk, platform), completions(4, "cpu")
    assert got == reference
    assert [completion.finish_reason for completion in got] == ["stop", "stop", "length", "stop"]


def test_compilation_is_counted_apart(model: api.Model, asked: list[Request]) -> None:
    def timings() -> Timings:
        made = Batch(model.engine, model.tokenizer, asked, chunk=5)
        collect(made)
        return made.timings

    first, second = timings(), timings()
    assert first.compile_seconds > 0 == second.compile_seconds
    assert first.first_token_seconds > first.prompt_seconds > 0
    assert second.first_token_seconds == second.prompt_seconds
    assert first.generated_tokens == second.generated_tokens > 0
    assert first.prompt_tokens == sum(len(request.tokens) for request in asked)


def test_logits_that_are_not_finite_are_an_error_not_token_zero() -> None:
    made, engine = batch([[1, 2, 3, STOP]], [Request([1], CONTEXT)], chunk=1)
    steps = engine._steps

    def overflow(state: State, count: int) -> tuple[State, Emitted]:
        state, emitted = steps(state, count)
        overflown = emitted.choice._replace(finite=np.zeros_like(emitted.choice.finite))
        return state, emitted._replace(choice=overflown)

    engine._steps = overflow  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"not finite.*bfloat16"):
        collect(made)
