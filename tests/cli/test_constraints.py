"""Answers held to something, by flag and by line of JSON."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run, answers_in
from tests.cli.test_batch import MUCH

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["snow", "ice"]}}, "required": ["a"]}


@pytest.mark.usefixtures("loaded")
def test_by_flag(run: Run, tmp_path: Path) -> None:
    schema, lark = tmp_path / "a.json", tmp_path / "a.lark"
    schema.write_text(json.dumps(SCHEMA | {"additionalProperties": False}))
    lark.write_text('start: "x" "y"')
    for flags, right in (
        ([f"--json_schema={schema}"], ('{"a": "snow"}\n', '{"a": "ice"}\n')),
        ([f"--lark={lark}"], ("xy\n",)),
        (["--choice=yes", "--choice=no"], ("yes\n", "no\n")),
        (["--regex=a{3}"], ("aaa\n",)),
    ):
        result = run("--prompt=x", *flags)
        assert result.code == 0 and result.out in right, result
    assert run("--prompt=x", "--json_object", "--max_tokens=4").out.startswith("{")


@pytest.mark.usefixtures("loaded")
def test_by_line(run: Run, tmp_path: Path) -> None:
    """A line's own wins over the run's."""
    file = tmp_path / "asked.jsonl"
    lines: list[dict[str, object]] = [
        {"json_schema": SCHEMA | {"additionalProperties": False}},
        {"regex": "b{2}"},
        {},
        {"choice": ["one"]},
        {"lark": 'start: "q"'},
        {"json_object": False, "max_tokens": 3},
        {"regex": "a", "choice": ["b"]},
        {"json_schema": {"not": {}}},
    ]
    file.write_text("".join(json.dumps({"prompt": "x", **line}) + "\n" for line in lines))
    result = run(f"--prompt_file={file}", "--ordered", "--choice=all")
    assert result.code == 3
    found = answers_in(result.out)
    assert json.loads(found[0]["text"])["a"] in ("snow", "ice")
    assert [line["text"] for line in found[1:5]] == ["bb", "all", "one", "q"]
    assert found[5]["text"] != "all" and len(found[5]["tokens"]) == 3
    assert "regex and choice exclude each other" in found[6]["error"]
    assert "'not'" in found[7]["error"]


@pytest.mark.usefixtures("loaded")
def test_what_llguidance_refuses_names_the_file(
    refuses: Callable[..., None], tmp_path: Path
) -> None:
    schema, lark = tmp_path / "a.json", tmp_path / "a.lark"
    schema.write_text('{"type": "integer", "minimum": 5, "maximum": 3}')
    lark.write_text("start: foo")
    refuses(["--prompt=x", f"--json_schema={schema}"], f"--json_schema={schema}: The json_schema")
    refuses(["--prompt=x", f"--lark={lark}"], f"--lark={lark}: The lark can't be used", '"foo"')


@pytest.mark.usefixtures("loaded")
def test_a_line_that_fails_on_the_way(run: Run, tmp_path: Path) -> None:
    """It gets its error, its other fields, and no say in the rest."""
    file, output = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    much = {"id": "b", "prompt": "x", "regex": MUCH, "n": 2, "label": 7}
    banned = {"id": "c", "prompt": "x", "regex": "a+", "logit_bias": {"97": -math.inf}}
    lines: list[dict[str, object]] = [
        {"id": "a", "prompt": "haiku: snow", "max_tokens": 4},
        much,
        banned,
        {"id": "d", "prompt": "x", "choice": ["yes"]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = [f"--prompt_file={file}", f"--output={output}", "--ordered"]
    result = run(*argv)
    assert result.code == 3 and "2 of 4 prompts were refused" in result.err
    found = answers_in(output.read_text())
    assert [(line["id"], line["sample"]) for line in found] == [
        ("a", 0),
        ("b", 0),
        ("b", 1),
        ("c", 0),
        ("d", 0),
    ]
    assert len(found[0]["tokens"]) == 4 and found[4]["text"] == "yes"
    for line in found[1:3]:
        assert line["error"].startswith(f"{file}, line 2: The constraint is too much: ")
        assert line["label"] == 7 and "text" not in line
    assert found[3]["error"].startswith(f"{file}, line 3: sampling.logit_bias bans every token")
    # Once they are right, they are answered, and nothing else is.
    lines[1:3] = [much | {"regex": "b"}, banned | {"logit_bias": {}}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = run(*argv, "--resume")
    assert again.code == 0 and "2 of 4 prompts are answered already." in again.err
    found = answers_in(output.read_text())
    assert [line["id"] for line in found] == ["a", "d", "b", "b", "c"]
    assert [line["text"] for line in found[2:4]] == ["b", "b"]


@pytest.mark.usefixtures("loaded")
def test_one_that_fails_ends_a_strict_run_and_a_single_one(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    lines = [{"prompt": "x", "choice": ["yes"]}, {"prompt": "x", "regex": MUCH}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    strict = run(f"--prompt_file={file}", "--strict")
    assert strict.code == 2
    told = f"error: {file}, line 2: The constraint is too much: "
    assert strict.err.splitlines()[-1].startswith(told)
    single = run("--prompt=x", f"--regex={MUCH}")
    assert single.code == 2
    assert single.err.splitlines()[-1].startswith("error: The constraint is too much: ")


def test_refused(refuses: Callable[..., None], tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"patternProperties": {}}')
    refuses([f"--json_schema={bad}"], "patternProperties")
    bad.write_text('{"items": {"type": "strng"}}')
    refuses(
        [f"--json_schema={bad}"], f"--json_schema={bad}: #/items/type of the JSON schema is 'strng'"
    )
    lark = tmp_path / "bad.lark"
    lark.write_text("start: x\nx[temperature=0.0]: /[a-z]/")
    refuses([f"--lark={lark}"], f"--lark={lark}: line 2 of the grammar gives x a temperature")
    refuses(["--choice=a", "--choice="], "choice has an empty text, number 2; leave it out.")
    refuses(["--json_schema=nowhere.json"], "--json_schema=nowhere.json can't be read")
    refuses(["--regex=a", "--json_object"], "json_object and regex exclude each other")
