"""Answers held to something, by flag and by line of JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run, answers_in

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


def test_refused(refuses: Callable[..., None], tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"patternProperties": {}}')
    refuses([f"--json_schema={bad}"], "patternProperties")
    refuses(["--json_schema=nowhere.json"], "--json_schema=nowhere.json can't be read")
    refuses(["--regex=a", "--json_object"], "json_object and regex exclude each other")
