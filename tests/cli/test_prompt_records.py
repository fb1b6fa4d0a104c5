"""Arrays, standard input and what is no file; fields that are carried; n and log-probabilities of a
line's own; what an answer's line says of its making."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_jax import api
from tests.cli.conftest import Result, Run, answers_in

LINES = [
    {"id": "a", "prompt": "snow", "max_tokens": 3, "label": {"é": [1, None]}, "source": None},
    {"messages": [{"role": "user", "content": "rain"}], "max_tokens": 2},
]


def piped(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))


@pytest.mark.usefixtures("loaded")
def test_an_array_and_stdin_are_answered_as_lines_are(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, array = "\n".join(map(json.dumps, LINES)), json.dumps(LINES, indent=1)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.JSON").write_text("\ufeff" + array)
    wanted = run(f"--prompt_file={tmp_path / 'a.jsonl'}", "--ordered")
    assert wanted.code == 0 and len(answers_in(wanted.out)) == 2
    assert run(f"--prompt_file={tmp_path / 'a.JSON'}", "--ordered").out == wanted.out
    for content in (lines, array, f"\n {array}"):
        piped(monkeypatch, content)
        assert run("--prompt_file=-", "--ordered").out == wanted.out
    # Texts: one a line, or of an array; a bracket alone makes no JSON.
    piped(monkeypatch, "[snow]\n\nrain\n")
    assert [a["id"] for a in answers_in(run("--prompt_file=-", "--ordered").out)] == [1, 3]
    piped(monkeypatch, '["[snow]", "rain"]')
    assert [a["id"] for a in answers_in(run("--prompt_file=-", "--ordered").out)] == [1, 2]


ARRAYS = {
    "{}": "begins with an object, but a .json file of prompts must be an array, [{...}, ...]; nam",
    '{"prompt": "a"}\n{"prompt": "b"}': "[{...}, ...]; name it .jsonl if it has one object a line",
    "3": "holds 3, but a .json file of prompts must be an array, [{...}, ...].",
    "[": "it is not JSON (Expecting value at column 2)",
    "[]": "holds no prompts",
    "[3]": "item 1: it is 3, but it must be an object, {...}, or a text.",
    '[{"prompt": "a"}, {"prompt": 3}]': "item 2: prompt is 3, but it must be text",
    '["a", ""]': "item 2: The prompt is empty",
    '[{"prompt": "a", "prompt": "b"}]': "the key 'prompt' appears twice",
    "[" * 100000: "its JSON is nested too deeply",
}


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("content", ARRAYS, ids=range(len(ARRAYS)))
def test_arrays_that_are_refused(
    refuses: Callable[..., None], tmp_path: Path, content: str
) -> None:
    (tmp_path / "a.json").write_text(content)
    refuses([f"--prompt_file={tmp_path / 'a.json'}", "--strict"], "a.json", ARRAYS[content])


@pytest.mark.usefixtures("nothing_loads")
def test_only_files_are_read(refuses: Callable[..., None], tmp_path: Path) -> None:
    """A pipe would be waited for, and a device never ends."""
    os.mkfifo(tmp_path / "fifo")
    for flag in ("prompt_file", "tools"):
        refuses([f"--{flag}={tmp_path / 'fifo'}"], f"--{flag}", "can't be read: it is a pipe")
        refuses([f"--{flag}=/dev/zero"], f"--{flag}", "can't be read: it is a device, and no file")
        refuses([f"--{flag}={tmp_path}"], f"--{flag}", "can't be read: Is a directory")
    base = f"--base={tmp_path / 'fifo'}"
    refuses(["compare", base], "fifo: the base can't be read: it is a pipe, and no file; give")
    refuses(["compare", f"--reference={tmp_path / 'fifo'}"], "which is neither a file nor one of")
    (tmp_path / "prompts.txt").write_text("snow")
    output = [f"--prompt_file={tmp_path / 'prompts.txt'}", f"--output={tmp_path / 'fifo'}"]
    refuses([*output, "--resume"], "fifo is no file; name one, or leave it out")
    dump = tmp_path / "dump"
    dump.mkdir()
    os.mkfifo(dump / "mapping.json")
    refuses(["compare", f"--candidate={dump}", "--tokens=1"], "mapping.json", "it is a pipe")
    refuses(["--config=/dev/zero"], "--config=/dev/zero can't be read: it is a device, and no file")


@pytest.mark.usefixtures("loaded")
def test_what_is_no_setting_is_carried(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    wrong = {"messages": [], "label": 7}
    path.write_text("\n".join(map(json.dumps, [*LINES, wrong, {"prompt": 3, "label": 8}])))
    result = run(f"--prompt_file={path}", "--ordered")
    first, second, late, early = answers_in(result.out)
    assert (first["label"], first["source"]) == ({"é": [1, None]}, None)
    assert "label" not in second and (late["label"], early["label"]) == (7, 8)
    assert "error" in late and "error" in early
    # Named, since one that is misspelt would do nothing.
    assert "carried from prompts into their answers: 'label', 'source'\n" in result.err


@pytest.mark.usefixtures("loaded")
def test_n_and_log_probabilities_of_a_lines_own(run: Run, tmp_path: Path) -> None:
    """Come out as those of a run that asks for them of all lines."""
    path = tmp_path / "prompts.jsonl"
    ids = range(1, 4)

    def answers(own: dict[int, dict[str, Any]], *argv: str) -> dict[tuple[int, int], Any]:
        lines = [{"prompt": f"rain {i}", "max_tokens": 3} | own.get(i, {}) for i in ids]
        path.write_text("\n".join(map(json.dumps, lines)))
        result = run(f"--prompt_file={path}", "--temperature=1", *argv)
        assert result.code == 0
        return {(a["id"], a["sample"]): a for a in answers_in(result.out)}

    both = answers({}, "--n=2", "--top_logprobs=1")
    alone = answers({})
    mixed = answers({2: {"n": 2}, 3: {"n": 2, "top_logprobs": 1}})
    assert mixed.keys() == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1)}
    for key, answer in mixed.items():
        wanted = alone[key] if key[0] == 1 else both[key]
        assert answer["text"] == wanted["text"] and answer["sampling"] == wanted["sampling"]
        assert ("logprobs" in answer) == (key[0] == 3)
        if key[0] != 3:
            continue
        for entry, other in zip(answer["logprobs"], wanted["logprobs"], strict=True):
            # Other rows side by side, other last bits.
            assert entry["logprob"] == pytest.approx(other["logprob"], rel=1e-5, abs=1e-5)
            assert len(entry["top"]) == 1 and entry["token"] == other["token"]


@pytest.mark.usefixtures("loaded")
def test_a_line_says_how_it_was_made(run: Run, tmp_path: Path, loaded: api.Model) -> None:
    """So that any one of them can be made again alone."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "snow"}\n{"prompt": "rain", "temperature": 0, "n": 2}\n')
    argv = [f"--prompt_file={path}", "--n=3", "--temperature=0.9", "--seed=4", "--max_tokens=5"]
    lines = answers_in(run(*argv, "--ordered").out)
    assert all((line["model"], line["dtype"]) == ("haiku", "float32") for line in lines)
    said = [line["sampling"] for line in lines]
    assert said == [*(f"temperature 0.9, seed {seed}" for seed in (4, 5, 6)), "greedy", "greedy"]
    again = loaded.generate("snow", sampling=api.Sampling(temperature=0.9, seed=6), max_tokens=5)
    assert again.text == lines[2]["text"]


class Terminal(io.TextIOWrapper):
    """Both streams on one screen, on which a carriage return goes back to the line's beginning."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", newline="")

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        self.flush()
        shown = []
        for line in self.buffer.getvalue().decode().split("\n"):  # type: ignore[attr-defined]
            cells: list[str] = []
            for part in line.split("\r"):
                cells[: len(part)] = part
            shown.append("".join(cells))
        return shown


@pytest.mark.usefixtures("loaded")
def test_answers_and_the_bar_share_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"rain {i}\n" for i in range(9)))
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        assert isinstance(result := run(f"--prompt_file={path}", "--max_tokens=2"), Result)
    assert result.code == 0
    lines = [line for line in terminal.screen() if "finish_reason" in line]
    assert sorted(json.loads(line)["id"] for line in lines) == list(range(1, 10))
    assert any(line.startswith("answers: 100%") for line in terminal.screen())
