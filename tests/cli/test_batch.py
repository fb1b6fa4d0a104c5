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
MUCH = "(((((.{1,50}){1,50}){1,50}){1,50}){1,50})"
"""An expression that llguidance gives up after some tokens."""


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
            line("h", snow()) | {"method": "GET"},
        ],
    )
    output = tmp_path / "answers.jsonl"
    result = run(f"--prompt_file={asked}", f"--output={output}", "--ordered")
    assert (result.code, result.out) == (3, ""), result
    assert "7 of 10 prompts were refused; their lines say why in 'response'" in result.err
    assert "sampling    greedy; prompts with settings of their own: 1\n" in result.err
    assert "bodies name 'gpt-4o'; haiku answers them." in result.err
    found = answers_in(output.read_text())
    assert [one["custom_id"] for one in found] == [*"abcdefg", None, None, "h"]
    assert [one["response"]["status_code"] for one in found] == [200] * 3 + [400] * 7
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
        "method is 'GET', but it must be POST.",
    )
    for number, (body, said) in enumerate(zip(bodies[3:], words, strict=True), start=4):
        error = body["error"]
        assert error["message"].startswith(f"{asked}, line {number}: ") and said in error["message"]
        assert error["type"] == "invalid_request_error"
    assert bodies[3]["error"]["param"] == "temprature"


def without_ids(text: str) -> list[Any]:
    """Answers by custom_id, without what is drawn afresh for each."""
    found = []
    for one in answers_in(text):
        response = one["response"] | {"request_id": None}
        response["body"] = {k: v for k, v in response["body"].items() if k not in ("id", "created")}
        found.append((one["custom_id"] or "", json.dumps(response)))
    return sorted(found)


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("cut", [0.0, 0.5, 1.0])
def test_resumed_it_comes_out_as_if_it_had_not_been_cut(
    run: Run, tmp_path: Path, cut: float
) -> None:
    """Seeds follow names; what was refused is tried again."""
    lines = [line(f"p{i}", snow(temperature=1.3, max_tokens=3 + i, n=1 + i % 2)) for i in range(5)]
    lines[2] = line("p2", snow(n=0))
    asked, output = write(tmp_path / "asked.jsonl", lines), tmp_path / "out.jsonl"
    argv = [f"--prompt_file={asked}", f"--output={output}", "--batch_invariant"]
    assert run(*argv).code == 3
    whole = output.read_text()
    output.write_text(whole[: int(cut * len(whole))])
    result = run(*argv, "--resume")
    assert result.code == 3 and "1 of 5 prompts were refused" in result.err
    assert ("4 of 5 prompts are answered already." in result.err) == (cut == 1)
    assert without_ids(output.read_text()) == without_ids(whole)


@pytest.mark.usefixtures("loaded")
def test_what_cannot_be_resumed(run: Run, refuses: Callable[..., None], tmp_path: Path) -> None:
    asked = write(tmp_path / "asked.jsonl", [line("a", snow(max_tokens=2))])
    output = tmp_path / "out.jsonl"
    argv = [f"--prompt_file={asked}", f"--output={output}"]
    assert run(*argv).code == 0
    refuses(argv, "exists already; go on with it by --resume")
    refuses([f"--prompt_file={asked}", "--resume"], "--resume needs --output")
    changed = run(*argv, "--resume", "--temperature=0.5")
    assert "was begun with sampling.temperature 0.0, which is 0.5 now" in changed.err
    write(asked, [line("a", snow(max_tokens=3)), line("b", snow(max_tokens=2))])
    told = 'has an answer to the prompt with the custom_id "a", which is another prompt now'
    refuses([*argv, "--resume"], told, "give what is new one of its own")
    write(asked, [line("a", snow(max_tokens=2)), line("b", snow(max_tokens=2))])
    assert "1 of 2 prompts are answered already." in run(*argv, "--resume").err
    with output.open("a") as file:
        file.write('{"id": 1, "sample": 0, "text": "a"}\n')
    refuses([*argv, "--resume"], "line 3 is no answer of a run", "it has no 'custom_id'")


@pytest.mark.usefixtures("loaded")
def test_one_that_fails_on_the_way_is_refused_alone(
    run: Run, refuses: Callable[..., None], tmp_path: Path
) -> None:
    """What none of the checks before the first token sees."""
    lines = [line(name, snow(max_tokens=2)) for name in "abc"]
    asked = write(tmp_path / "asked.jsonl", lines)
    output = run(f"--prompt_file={asked}").out
    lines[1] = line("b", snow(regex=MUCH, n=2))
    write(asked, lines)
    result = run(f"--prompt_file={asked}", "--ordered")
    assert result.code == 3 and "1 of 3 prompts were refused" in result.err
    found = answers_in(result.out)
    assert [one["response"]["status_code"] for one in found] == [200, 400, 200]
    error = found[1]["response"]["body"]["error"]
    assert error["message"].startswith(f"{asked}, line 2: The constraint is too much: ")
    for place in (0, 2):
        same = without_ids(json.dumps(found[place]))
        assert same[0] in without_ids(output)
    strict = run(f"--prompt_file={asked}", "--strict")
    assert strict.code == 2
    assert strict.err.splitlines()[-1].startswith(f"error: {asked}, line 2: The constraint is")


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


@pytest.mark.usefixtures("loaded")
def test_strict(refuses: Callable[..., None], tmp_path: Path) -> None:
    asked = write(tmp_path / "asked.jsonl", [line("a", snow(model="haiku", n=0))])
    refuses([f"--prompt_file={asked}", "--strict"], "line 1: n is 0")
