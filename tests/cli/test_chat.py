"""`run.py chat` on a pipe, and what its commands do."""

import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qwen_jax
from qwen_jax.completions import StreamedText
from qwen_jax.conversation import Conversation, parsed
from qwen_jax.options import Options
from tests.cli.conftest import Result, Run

Chat = Callable[..., Result]


@pytest.fixture
def chat(run: Run, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """run.py chat with some lines on stdin."""

    def chat(*lines: str, flags: tuple[str, ...] = ()) -> Result:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", "--max_tokens=20", *flags)

    return chat


def test_turns_see_what_was_said(chat: Chat, model: qwen_jax.Model) -> None:
    result = chat("haiku: snow", "", '"""', "haiku:", "moss", '"""', flags=("--system=Be brief.",))
    said: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    for text in ("haiku: snow", "haiku:\nmoss"):
        said.append({"role": "user", "content": text})
        said.append({"role": "assistant", "content": model.generate(said, max_tokens=20).text})
    right = [message["content"] for message in said if message["role"] == "assistant"]
    assert (result.code, result.out) == (0, "".join(f"{text}\n" for text in right))


def test_commands(chat: Chat, model: qwen_jax.Model, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    result = chat(
        "haiku: snow",
        "/tokens",
        "/set temperature 0.7",
        "/set temprature 1",
        "/set top_p 2",
        "/set max_tokens many",
        "/set max_tokens 5",
        f"/save {file}",
        f"/save {file}",
        "/clear",
        "/retry",
        "/tokens",
        f"/load {file}",
        "/load nowhere.json",
        "/lod x",
        "/quit",
        "never read",
    )
    assert result.code == 0
    haiku = model.generate("haiku: snow", max_tokens=20).text
    assert result.out == f"{haiku}\n"
    messages = json.loads(file.read_text())["messages"]
    assert messages[1] == {"role": "assistant", "content": haiku}
    told = result.err.splitlines()[1:]
    words = (
        f"{len(model.tokens(messages))} of 512 tokens",
        "max_tokens 20, temperature 0.7, seed 0",
        "did you mean temperature?",
        "error: top_p is 2, but",
        "max_tokens is 'many'",
        "max_tokens 5, temperature 0.7",
        f"wrote {file}",
        "exists already",
        "begins anew",
        "no message to answer again",
        "0 of 512 tokens",
        f"2 messages from {file}",
        "nowhere.json",
        "did you mean /load?",
    )
    assert len(told) == len(words), told
    for line, said in zip(told, words, strict=True):
        assert said in line


def test_again(chat: Chat, model: qwen_jax.Model) -> None:
    """By another seed, and without the answer that was given."""
    result = chat("haiku: snow", "/retry", flags=("--temperature=1.2",))
    right = [
        model.generate(
            "haiku: snow", max_tokens=20, sampling=qwen_jax.Sampling(temperature=1.2, seed=seed)
        ).text
        for seed in (0, 1)
    ]
    assert right[0] != right[1] and result.out == "".join(f"{text}\n" for text in right)


def test_a_seed_is_no_matter_of_greedy_answers(chat: Chat, caplog: Any) -> None:
    """Nobody asked for the one that /retry has counted on."""
    lines = "haiku: snow", "/retry", "/set temperature 0", "/retry"
    assert chat(*lines, flags=("--temperature=1",)).code == 0
    assert "seed does nothing" not in caplog.text


def test_an_interrupt_ends_an_answer_and_not_the_chat(
    chat: Chat, model: qwen_jax.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, asked = qwen_jax.Model.stream, []

    def stream(self: qwen_jax.Model, prompt: Any, **options: Any) -> Iterator[StreamedText]:
        asked.append(list(prompt))

        def pieces() -> Iterator[StreamedText]:
            if len(asked) > 1:
                yield from right(self, prompt, **options)
                return
            yield StreamedText("half of")
            raise KeyboardInterrupt

        return pieces()

    monkeypatch.setattr(qwen_jax.Model, "stream", stream)
    result = chat("haiku: snow", "haiku: moss")
    assert result.code == 0 and result.out.startswith("half of\n")
    assert "(interrupted)" in result.err and len(result.out.splitlines()) > 2
    assert asked[1][1] == {"role": "assistant", "content": "half of"}


def test_what_is_too_long_was_never_said(model: qwen_jax.Model) -> None:
    options = Options(max_tokens=4, sampling=qwen_jax.Sampling())
    conversation = Conversation(model, options)
    with pytest.raises(qwen_jax.UserError, match="context of 512"):
        list(conversation.answer("word " * 600))
    assert conversation.messages == []
    assert dataclasses.asdict(options["sampling"])["seed"] == 0


def told(result: Result) -> list[str]:
    """What is told after the first line."""
    return result.err.splitlines()[1:]


def test_commands_that_take_nothing(chat: Chat) -> None:
    """Say so; nothing is done, and the chat goes on."""
    names = ("retry", "quit", "tokens", "clear", "help")
    result = chat("haiku: snow", *(f"/{name} x y" for name in names), "/tokens", "  /quit  ", "no")
    (*refused, tokens) = told(result)
    assert [line.partition(", ")[0] for line in refused] == [
        f"error: /{name} takes no argument" for name in names
    ]
    assert all("has 'x y'; leave it out." in line for line in refused)
    assert tokens.endswith(" of 512 tokens") and not tokens.startswith("0 ")


def test_quotes_hold_a_message(chat: Chat, model: qwen_jax.Model) -> None:
    """Whatever it begins with."""
    result = chat('"""', "/clear", "haiku: snow", '"""', '"""', "/quit", '"""')
    said: list[dict[str, str]] = []
    for text in ("/clear\nhaiku: snow", "/quit"):
        said.append({"role": "user", "content": text})
        said.append({"role": "assistant", "content": model.generate(said, max_tokens=20).text})
    assert result.out == "".join(f"{message['content']}\n" for message in said[1::2])
    assert not any("error" in line for line in told(result))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("max_tokens 5e0", "max_tokens is 5.0, but it must be a whole number, at least 1."),
        ('max_tokens "5"', "max_tokens is '\"5\"', but it must be a number."),
        ("max_tokens null", "max_tokens is 'null', but it must be a number."),
        ("max_tokens true", "max_tokens is 'true', but it must be a number."),
        ("max_tokens 0", "max_tokens is 0, but it must be at least 1."),
        ("max_tokens", "max_tokens is '', but it must be a number."),
        ("top_p null", "top_p is 'null', but it must be a number."),
        ("seed 1.5", "seed is 1.5, but it must be a whole number."),
        ("temperature [1]", "temperature is '[1]', but it must be a number."),
    ],
)
def test_settings_that_make_no_sense(model: qwen_jax.Model, typed: str, words: str) -> None:
    conversation = Conversation(model, Options(max_tokens=4, sampling=qwen_jax.Sampling()))
    with pytest.raises(qwen_jax.UserError) as error:
        conversation.command(*parsed(f"/set {typed}"))
    assert str(error.value) == words
    assert conversation.command(*parsed("/set")) == "max_tokens 4, greedy"


COMMANDS = ("/system", "/clear", "/load")
QUESTION, ANSWER = {"role": "user", "content": "haiku: a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("before", "ways"),
    [
        ([], {"shorten the message"}),
        ([{"role": "system", "content": "Be brief."}], {"shorten the message", "/system"}),
        ([QUESTION, ANSWER], {"shorten the message", "/clear", "/load"}),
    ],
)
def test_a_full_context(
    model: qwen_jax.Model, before: list[dict[str, Any]], ways: set[str]
) -> None:
    """Says what can be done, and that is all that can."""
    conversation = Conversation(model, Options(max_tokens=4, sampling=qwen_jax.Sampling()))
    conversation.messages = list(before)
    with pytest.raises(qwen_jax.UserError) as error:
        list(conversation.answer("word " * 600))
    text = str(error.value)
    tokens = len(model.tokens([*before, {"role": "user", "content": "word " * 600}]))
    assert text.startswith(f"With this message the chat has {tokens} tokens, but the model has a ")
    assert ways == {way for way in ("shorten the message", *COMMANDS) if way in text}
    assert conversation.messages == before


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ([], "no message to answer again"),
        ([ANSWER], "no message to answer again"),
        ([{"role": "system", "content": "Be brief."}, ANSWER], "no message to answer again"),
        ([{"role": "system", "content": "word " * 600}, QUESTION, ANSWER], "context of 512"),
    ],
)
def test_what_fails_leaves_what_was_said(
    model: qwen_jax.Model, before: list[dict[str, Any]], words: str
) -> None:
    options = Options(max_tokens=4, sampling=qwen_jax.Sampling(temperature=1.0, seed=3))
    conversation = Conversation(model, options)
    conversation.messages = list(before)
    for _ in range(2):
        with pytest.raises(qwen_jax.UserError, match=words):
            list(conversation.retry())
    assert conversation.messages == before
    assert conversation.command(*parsed("/set")) == "max_tokens 4, temperature 1.0, seed 3"


def test_an_answer_that_fails_halfway_was_never_said(
    model: qwen_jax.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(self: qwen_jax.Model, prompt: Any, **options: Any) -> Iterator[StreamedText]:
        yield StreamedText("half of")
        raise qwen_jax.UserError("The logits are not finite.")

    monkeypatch.setattr(qwen_jax.Model, "stream", stream)
    conversation = Conversation(model, Options(max_tokens=4, sampling=qwen_jax.Sampling()))
    conversation.messages = [QUESTION, ANSWER]
    for again in (conversation.retry, lambda: conversation.answer("haiku: moss")):
        with pytest.raises(qwen_jax.UserError, match="not finite"):
            list(again())
        assert conversation.messages == [QUESTION, ANSWER]


def test_an_interrupt_before_the_first_word(
    model: qwen_jax.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves a new message said, and the answer that was to be made again."""

    def stream(self: qwen_jax.Model, prompt: Any, **options: Any) -> Iterator[StreamedText]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(qwen_jax.Model, "stream", stream)
    conversation = Conversation(model, Options(max_tokens=4, sampling=qwen_jax.Sampling()))
    conversation.messages = [QUESTION, ANSWER]
    with pytest.raises(KeyboardInterrupt):
        list(conversation.retry())
    assert conversation.messages == [QUESTION, ANSWER]
    with pytest.raises(KeyboardInterrupt):
        list(conversation.answer("haiku: a"))
    assert conversation.messages == [QUESTION, ANSWER, QUESTION]


def test_refused(refuses: Callable[..., None]) -> None:
    refuses(["chat", "--prompt=x"], "--prompt does nothing for chat")
    refuses(["chat", "--top_p=3"], "sampling.top_p is 3")
