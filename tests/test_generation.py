"""From token ids to text: pieces, stops, limits and looking ahead, on scripted engines."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qwen_jax import api
from qwen_jax.completions import Completion, Timings
from qwen_jax.engine import steps
from qwen_jax.engine.reading import overflow
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.generation import Generation
from qwen_jax.requests import Request
from qwen_jax.text.tokenizer import Tokenizer
from tests.scripted import CONTEXT, Scripted

TOKENIZER: Tokenizer = api.load().tokenizer
(STOP, *_) = TOKENIZER.stop_ids

here_and_ahead = pytest.mark.parametrize("ahead", [False, True], ids=["cpu", "gpu"])


def scripted(scripts: Sequence[Sequence[int]], **options: Any) -> Scripted:
    return Scripted(scripts, TOKENIZER, **options)


def collect(
    scripts: Sequence[Sequence[int]], requests: Sequence[Request], **options: Any
) -> tuple[list[str], list[Completion]]:
    return scripted(scripts, **options).run(requests).collect()


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


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


requests = st.builds(
    Request,
    tokens=st.lists(st.just(5), min_size=1, max_size=CONTEXT - 1),
    max_tokens=st.integers(1, 2 * CONTEXT),
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
    rows=st.lists(st.tuples(scripts, requests), min_size=1, max_size=6),
    slots=st.integers(1, 4),
    steps=st.integers(1, 9),
    ahead=st.booleans(),
)
@hypothesis_settings(max_examples=250)
def test_every_script_gives_its_text(
    rows: list[tuple[list[int], Request]], slots: int, steps: int, ahead: bool
) -> None:
    lists, asked = [script for script, _ in rows], [request for _, request in rows]
    texts, completions = collect(lists, asked, slots=slots, steps=steps, ahead=ahead)
    for row, completion, text in zip(rows, completions, texts, strict=True):
        assert (completion.text, completion.tokens, completion.finish_reason) == expected(*row)
        assert text == completion.text
        assert completion.prompt_tokens == len(row[1].tokens)


@here_and_ahead
def test_pieces_come_call_by_call_in_whole_characters(ahead: bool) -> None:
    script = tokens_of("é🦊é🦊")
    assert len(script) > 8, "each character must be several tokens for this test"
    run = scripted([[*script, STOP]], steps=1, ahead=ahead).run([Request([1], CONTEXT)])
    *pieces, last = run.pieces()
    assert [piece.text for piece in pieces] == ["é", "🦊", "é", "🦊"]
    assert not any(piece.completion for piece in pieces)
    assert last.text == "" and last.completion is not None
    # The stop token's, and the one that was under way meanwhile.
    assert len(run.scripted.calls) == len(script) + 1 + ahead


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_a_character_cut_by_the_limit_is_shown_as_replaced(steps: int) -> None:
    script = tokens_of("a🦊")
    texts, _ = collect([script], [Request([1], len(script) - 1)], steps=steps)
    assert texts == ["a\ufffd"]


def test_stop_strings_across_every_boundary() -> None:
    text = "the old pond\na frog leaps in\nthe sound of water"
    script = tokens_of(text)
    at = 0
    for token in script[:-1]:
        at += len(TOKENIZER.decode([token]))
        stop = text[at - 1 : at + 1]
        asked = Request([1], CONTEXT, stop=[stop])
        (shown,), (completion,) = collect([[*script, STOP]], [asked])
        assert shown == text[: text.index(stop)]
        assert completion.finish_reason == "stop"
        assert stop in TOKENIZER.decode(completion.tokens)
        assert stop not in TOKENIZER.decode(completion.tokens[:-1])


class TestWork:
    """How much is asked of the device."""

    @pytest.mark.parametrize(("ahead", "calls"), [(False, 3), (True, 4)])
    def test_looks_one_call_ahead_on_an_accelerator(self, ahead: bool, calls: int) -> None:
        run = scripted([[9] * 10 + [STOP]], ahead=ahead).run([Request([1], 30)])
        _, (completion,) = run.collect()
        assert len(completion.tokens) == 11
        assert len(run.scripted.calls) == calls

    @here_and_ahead
    @pytest.mark.parametrize(("most", "calls"), [(1, 1), (4, 1), (5, 2)])
    def test_no_call_is_asked_for_after_the_last_token(
        self, ahead: bool, most: int, calls: int
    ) -> None:
        run = scripted([[9] * 99], ahead=ahead).run([Request([1], most)])
        run.collect()
        assert len(run.scripted.calls) == calls

    def test_the_context_bounds_the_calls(self) -> None:
        run = scripted([[9] * 999], ahead=True).run([Request([1] * 60, 10**20)])
        _, (completion,) = run.collect()
        assert len(run.scripted.calls) == 1
        assert (completion.finish_reason, len(completion.tokens)) == ("length", 4)

    def test_a_row_ended_by_a_stop_string_leaves_its_slot(self) -> None:
        letters = [token for letter in "aabbab" for token in tokens_of(letter)]
        asked = [Request([1], 12, stop=["bb"]), Request([1], 12), Request([1], 2)]
        run = scripted([letters, letters * 2, letters * 3], slots=2, steps=2).run(asked)
        run.collect()
        assert [list(call) for call in run.scripted.calls] == [
            [0, 1],
            [0, 1],
            [1, 2],  # the third text, at once
            *[[1]] * 3,
        ]

    @here_and_ahead
    def test_requests_are_taken_when_there_is_soon_room_for_them(self, ahead: bool) -> None:
        """So that there may be any number of them."""
        taken = []

        def endless() -> Iterator[Request]:
            for i in itertools.count():
                taken.append(i)
                yield Request([1], 3 + i % 5)

        run = scripted([[9] * 9] * 99, slots=2, ahead=ahead).run(endless())
        pieces, ended = run.pieces(), 0
        while ended < 40:
            ended += next(pieces).completion is not None
            assert len(taken) <= ended + 2 * 2 * 2


def test_logprobs_are_those_of_the_chosen_tokens() -> None:
    requests = [Request([1], 9, top_logprobs=top) for top in (2, None, 1)]
    _, (completion, without, one) = scripted([[5, 6, STOP]] * 3).run(requests).collect()
    assert without.logprobs is None and one.logprobs is not None
    assert [e.top for e in one.logprobs] == [((t, -1.0 - t),) for t in one.tokens]
    entries = completion.logprobs
    assert entries is not None and [e.token for e in entries] == [5, 6, STOP]
    for entry in entries:
        t = entry.token
        assert entry.logprob == -1.0 - t and entry.top == ((t, -1.0 - t), (t + 1, -2.0 - t))


@here_and_ahead
def test_what_there_is_of_unfinished_texts(ahead: bool) -> None:
    """Of those that have begun, while it goes on and after it was left; then nothing is held."""
    script = tokens_of("one two three four five six seven eight")
    rows = [[*script[:1], STOP], script, script]
    run = scripted(rows, slots=2, steps=2, ahead=ahead).run([Request([1], CONTEXT)] * 3)
    made = run.generation
    assert made.timings == Timings() and made.timings.generation_rate == 0
    pieces = run.pieces()
    seen, number = "", -1
    while len(seen) < 8:
        number, text, _ = next(pieces)
        seen += text if number == 1 else ""
    completion = made.unfinished[1]
    assert (completion.text, completion.finish_reason) == (seen, "interrupted")
    assert completion.tokens == tuple(script[: len(completion.tokens)])
    assert TOKENIZER.decode(completion.tokens) == seen
    assert 0 not in made.unfinished
    assert made.timings.generated_tokens >= len(completion.tokens)
    pool = run.scripted.engine.pool
    assert pool.available < pool.size
    pieces.close()
    assert made.unfinished[1].text == seen
    assert pool.available == pool.size


def test_a_generation_runs_once() -> None:
    run = scripted([[STOP]]).run([Request([1], 3)])
    run.collect()
    assert list(run.pieces()) == []


def test_top_logprobs_out_of_range() -> None:
    with pytest.raises(UserError, match="top_logprobs is -1, but it must be at least 0"):
        Request([1], top_logprobs=-1)
    with pytest.raises(UserError, match=r"top_logprobs is 2049, .* 2048 tokens"):
        scripted([[1]]).run([Request([1], top_logprobs=2049)]).collect()


def test_wrong_requests() -> None:
    def run(**options: Any) -> None:
        collect([[STOP]], [Request([1], **options)])

    for most in (0, -1):
        with pytest.raises(UserError, match=f"max_tokens is {most}, but it must be at least 1"):
            Request([1], max_tokens=most)
    with pytest.raises(UserError, match="stop is '', but it must be a text that is not empty"):
        run(stop="")
    with pytest.raises(UserError, match=r"stop is .*not valid Unicode"):
        run(stop=["a\ud800"])
    for wrong in (-1, TOKENIZER.vocab_size):
        with pytest.raises(UserError, match=f"stop_ids holds {wrong!r}, but .* 0 to 2047"):
            run(stop_ids=[wrong])
    for other in (True, "13"):
        with pytest.raises(UserError, match=r"stop_ids is \[.*\], but it must be a list of whole"):
            run(stop_ids=[other])
    run(stop_ids=[np.int32(13)])
    with pytest.raises(UserError, match="names token 2048"):
        run(sampling=Sampling(logit_bias={2048: 1.0}))


@here_and_ahead
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (steps.NOT_FINITE, "not finite in float32: .*--weights=expanded"),
        (steps.BANNED, "bans every token"),
    ],
)
def test_what_is_no_token_is_an_error(code: int, words: str, ahead: bool) -> None:
    """And nothing is held after it."""
    run = scripted([[1, 2, 3, STOP]] * 2, steps=1, ahead=ahead).run([Request([1], CONTEXT)] * 2)
    pieces = run.pieces()
    next(pieces)
    run.scripted.code = code
    with pytest.raises(UserError, match=words):
        list(pieces)
    pool = run.scripted.engine.pool
    assert pool.available == pool.size


def test_who_cannot_go_on_ends_alone_where_somebody_is_told(model: api.Model) -> None:
    """The others' answers are what they are without it."""
    banned = Sampling(logit_bias=dict.fromkeys(range(2048), -np.inf))
    well = [model.request("haiku: snow"), model.request("haiku: rust", max_tokens=3)]
    request = dataclasses.replace(well[0], sampling=banned)
    told: list[tuple[int, str]] = []
    generation = model.run(
        [well[0], request, request, well[1]], lambda number, why: told.append((number, str(why)))
    )
    ended = {piece.number: piece.completion for piece in generation if piece.completion}
    assert [number for number, _ in told] == [1, 2] and "bans every token" in told[0][1]
    assert ended == {
        0: model.generate("haiku: snow"),
        3: model.generate("haiku: rust", max_tokens=3),
    }
    assert generation.unfinished == {}
    with pytest.raises(UserError, match=r"^sampling\.logit_bias bans every token"):
        model.generate("haiku: snow", sampling=banned)
    with pytest.raises(UserError, match=r"^prompt 1: sampling\.logit_bias bans every token"):
        model.generate(["a", "b"], n=2, samplings=[Sampling(), banned])


def test_the_way_out_of_an_overflow_is_another_setting() -> None:
    assert "choose --dtype=bfloat16 or float32" in overflow("m", jnp.dtype("float16"))
    assert "--dtype" not in overflow("m", jnp.dtype("bfloat16"))


@pytest.fixture(scope="module")
def model() -> api.Model:
    return api.load()


@pytest.fixture(scope="module")
def asked(model: api.Model) -> list[Request]:
    hot = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=4)
    return [
        model.request("Write a haiku about rivers.", top_logprobs=2),
        model.request("Write a haiku about the moon.", sampling=hot, top_logprobs=0),
        model.request("haiku: snow", max_tokens=7),
        model.request("Write a haiku about a fern.", stop=["n a", "\n"], top_logprobs=3),
    ]


def completions(run: Generation) -> list[Completion]:
    ended = {piece.number: piece.completion for piece in run if piece.completion is not None}
    return [ended[i] for i in range(len(ended))]


@here_and_ahead
@pytest.mark.parametrize("steps", [1, 4, 32])
def test_calls_and_looking_ahead_change_nothing(
    model: api.Model,
    asked: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    ahead: bool,
) -> None:
    def run(steps: int, ahead: bool) -> list[Completion]:
        # Rows by eights, since a CPU's product of one row has other bits.
        layout = model.engine.layout
        shapes = dataclasses.replace(layout.shapes, rows=(8,), steps=steps, ahead=ahead)
        monkeypatch.setattr(model.engine, "layout", layout._replace(shapes=shapes))
        return completions(model.run(asked))

    got = run(steps, ahead)
    assert got == run(4, False)
    assert [completion.finish_reason for completion in got] == ["stop", "stop", "length", "stop"]


def test_compilation_is_counted_apart(
    model: api.Model, asked: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def timings() -> Timings:
        made = model.run(asked[1:2])
        completions(made)
        return made.timings

    # A program of five steps a call is none of the other tests'.
    layout = model.engine.layout
    shapes = dataclasses.replace(layout.shapes, steps=5)
    monkeypatch.setattr(model.engine, "layout", layout._replace(shapes=shapes))
    first, second = timings(), timings()
    assert first.compile_seconds > 0 == second.compile_seconds
    assert first.first_token_seconds >= first.compile_seconds
    assert first.seconds > 0 < second.first_token_seconds <= second.seconds
    assert first.generated_tokens == second.generated_tokens > 0
    assert first.prompt_tokens == len(asked[1].tokens)
