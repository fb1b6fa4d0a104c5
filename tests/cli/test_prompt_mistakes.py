"""What a file of prompts or of tools may have been meant to say is told with the way out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax import prompt_records


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("TEMPERATURE", "temperature"),
        ("Max_Tokens", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("topP", "top_p"),
        ("N", "n"),
        ("Stop", "stop"),
        ("ID", "id"),
        ("MAX_NEW_TOKENS", "max_tokens"),
    ],
)
def test_other_ways_to_write_a_field(
    refuses: Callable[..., None], tmp_path: Path, field: str, meant: str
) -> None:
    """Carried into the answer, as unknown ones are, it would do nothing."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", field: 1}))
    refuses([f"--prompt_file={path}"], f"line 1 has the field {field!r}; did you mean {meant!r}?")


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_under_the_name_of_lines(
    refuses: Callable[..., None], tmp_path: Path, indent: int | None
) -> None:
    """Of one that is indented, the last object alone might be a line of JSON."""
    path = tmp_path / "prompts.jsonl"
    array = json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=indent)
    path.write_text(f"\n{array}\n")
    refuses([f"--prompt_file={path}"], "prompts.jsonl is an array of JSON, but a file of this name")


def test_a_line_that_is_an_array_is_wrong_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('["a"]\n{"prompt": "b"}\n')
    (_, _, wrong), (_, _, right) = prompt_records.read(str(path))
    assert isinstance(wrong, prompt_records.Damaged) and 'it is ["a"], but' in str(wrong.error)
    assert right == {"prompt": "b"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "can't be read: No such file"),
        (b"[", "it is not JSON (Expecting value at column 2)"),
        (b"{}", "tools is {}, but it must be a list of JSON schemas"),
        (b'[{"type": "function"}]', "tool 0 is"),
        (b'[{"name": "f", "name": "g"}]', "the key 'name' appears twice"),
    ],
)
@pytest.mark.usefixtures("nothing_loads")
def test_files_of_tools(
    refuses: Callable[..., None], tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_bytes(content)
    refuses([f"--tools={path}"], "--tools", str(path) if content is None else "", words)
