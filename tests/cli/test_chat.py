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
from qwen_jax.conversation import Conversation
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
        "sampling.top_p is 2",
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


def test_refused(refuses: Callable[..., None]) -> None:
    refuses(["chat", "--prompt=x"], "--prompt does nothing for chat")
    refuses(["chat", "--top_p=3"], "sampling.top_p is 3")
