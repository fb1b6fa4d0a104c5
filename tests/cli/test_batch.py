"""OpenAI's batch format, read and written by generate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from tests.cli.conftest import Run, answers_in

CHAT = "/v1/chat/completions"


def line(name: Any, body: Any, url: str = CHAT, **more: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body, **more}


def snow(**more: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": "haiku: snow"}]} | more


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


@pytest.mark.usefixtures("loaded")
def test_answers(run: Run, tmp_path: Path) -> None:
    """Each line's own, in the file's order, or why not."""
    asked = write(
        tmp_path / "asked.jsonl",
        [
            line("a", snow(max_tokens=24)),
            line("b", snow(n=2, temperature=1.2, max_tokens=9)),
            line("c", {"prompt": "snow", "max_tokens": 4}, "/v1/completions"),
            line("d", snow(temprature=1)),
            line("e", snow(stream=True)),
            line("f", snow(), "/v1/embeddings"),
            line("g", snow(), colour="red"),
            line(7, snow()),
            {"prompt": "no line of a batch"},
        ],
    )
    output = tmp_path / "answers.jsonl"
    result = run(f"--prompt_file={asked}", f"--output={output}", "--ordered")
    assert (result.code, result.out) == (3, ""), result
    assert "6 of 9 prompts were refused; their lines say why in 'response'" in result.err
    assert "bodies name 'gpt-4o'; haiku answers them." in result.err
    found = answers_in(output.read_text())
    assert [one["custom_id"] for one in found] == [*"abcdefg", None, None]
    assert [one["response"]["status_code"] for one in found] == [200] * 3 + [400] * 6
    bodies = [one["response"]["body"] for one in found]
    first = ChatCompletion.model_validate(bodies[0]).choices[0]
    plain = run("--prompt=haiku: snow", "--max_tokens=24")
    assert first.message.content == plain.out.removesuffix("\n")
    second = ChatCompletion.model_validate(bodies[1])
    assert len(second.choices) == 2 and second.usage.completion_tokens <= 18
    assert Completion.model_validate(bodies[2]).choices[0].finish_reason == "length"
    words = (
        "did you mean 'temperature'",
        "stream is true",
        "url is '/v1/embeddings'",
        "'colour' is no field",
        "custom_id is 7",
        "'prompt' is no field",
    )
    for body, said in zip(bodies[3:], words, strict=True):
        assert said in body["error"]["message"] and body["error"]["type"] == "invalid_request_error"


@pytest.mark.usefixtures("loaded")
def test_seeds_follow_names(run: Run, tmp_path: Path) -> None:
    """An answer is the same in another order, and among others."""
    lines = [line(name, snow(temperature=1.3, max_tokens=8)) for name in ("x", "y", "z")]

    def texts(some: list[Any], *flags: str) -> dict[str, str]:
        asked = write(tmp_path / "asked.jsonl", some)
        result = run(f"--prompt_file={asked}", "--batch_invariant", *flags)
        assert result.code == 0, result
        return {
            one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"]
            for one in answers_in(result.out)
        }

    together = texts(lines)
    assert len(set(together.values())) > 1
    assert texts(lines[::-1]) == together
    assert texts(lines[1:2])["y"] == together["y"]
    assert texts(lines, "--seed=5") != together


def test_refused(refuses: Callable[..., None], tmp_path: Path) -> None:
    asked = write(tmp_path / "asked.jsonl", [line("a", snow()), line("a", snow())])
    refuses([f"--prompt_file={asked}"], "line 2 has the custom_id 'a', as", "line 1")
    asked = write(tmp_path / "asked.jsonl", [line("a", snow())])
    refuses([f"--prompt_file={asked}", "--system=x"], "system does nothing for", "bodies say how")
    refuses([f"--prompt_file={asked}", "--n=2"], "n does nothing for")
    refuses([f"--prompt_file={asked}", "--resume", "--output=x"], "resume does nothing for")


@pytest.mark.usefixtures("loaded")
def test_strict(refuses: Callable[..., None], tmp_path: Path) -> None:
    asked = write(tmp_path / "asked.jsonl", [line("a", snow(model="haiku", n=0))])
    refuses([f"--prompt_file={asked}", "--strict"], "line 1: n is 0")
