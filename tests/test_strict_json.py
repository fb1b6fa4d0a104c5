"""JSON of strangers: read as Python reads it, or refused in one sentence."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import regular_files, strict_json
from qwen_jax.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(value=st.dictionaries(TEXT, VALUES), ascii_only=st.booleans())
def test_what_python_wrote(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only, allow_nan=True)
    assert strict_json.parse_object(text, "x", allow_nan=True) == value
    assert strict_json.parse_object(text.encode("utf-8-sig"), "x", allow_nan=True) == value


BAD = {
    "empty": (b"", "it is not JSON (Expecting value at column 1)"),
    "cut": (b'{"a":\n', "it is not JSON (Expecting value at line 2, column 1)"),
    "two": (b"{} {}", "it is not JSON (Extra data at column 4)"),
    "list": (b"[1, 2]", "it is [1, 2], but it must be a JSON object"),
    "key twice": (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' appears twice"),
    "key twice within": (b'{"x": [{"b": {}, "b": {}}]}', "the key 'b' appears twice"),
    "key twice as escape": (b'{"a": 1, "\\u0061": 2}', "the key 'a' appears twice"),
    "latin-1": ('{"é": 1}'.encode("latin-1"), "it is not UTF-8 at byte 2"),
    "UTF-16": ("{}".encode("utf-16"), "it is not UTF-8 at byte 0"),
    "depth": (b'{"a":' + b"[" * 200_000, "nested too deeply"),
    "digits": (b'{"a": 1' + b"0" * 10_000 + b"}", "000... has 10001 digits"),
    "surrogate": (b'{"a": ["x\\ud800"]}', r"it holds \ud800, half a character"),
    "NaN": (b'{"a": NaN}', "NaN is no number of JSON"),
    "infinity": (b'{"a": [-Infinity]}', "-Infinity is no number of JSON"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "_"))
def test_one_fault_one_sentence(tmp_path, case):
    text, problem = BAD[case]
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(UserError) as caught:
        strict_json.read_object(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.endswith(".") and "\n" not in message
    assert problem in message


def test_half_a_character_where_it_is_escaped_again():
    assert strict_json.parse_object(r'{"id": "\ud800"}', "x", allow_halves=True)["id"] == "\ud800"


def test_nan_where_transformers_reads_it():
    found = strict_json.parse_object('{"a": NaN, "b": -Infinity}', "x", allow_nan=True)
    assert math.isnan(found["a"]) and found["b"] == -math.inf


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"config.json: the file can't be read: No such file"):
        strict_json.read_object(tmp_path / "config.json")
    (tmp_path / "x.json").mkdir()
    with pytest.raises(UserError, match=r"x.json: the file can't be read: Is a directory"):
        strict_json.read_object(tmp_path / "x.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(regular_files.MOST_BYTES + 1)
    with pytest.raises(UserError, match=r"it has more than 16000000 bytes"):
        strict_json.read_object(tmp_path / "large.json")
