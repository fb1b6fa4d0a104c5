"""Files of JSON lines, cut anywhere."""

import json
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.experiments.lines import Lines, NotWritten, read

RECORDS = st.lists(st.dictionaries(st.text(), st.text() | st.integers()), max_size=5)


@given(RECORDS, st.integers(0, 400), RECORDS)
def test_a_torn_line_goes_and_all_else_stays(
    tmp_path_factory: pytest.TempPathFactory, before: list, cut: int, after: list
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    lines = Lines(path)
    for record in before:
        lines.append(record)
    lines.close()
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    whole = before[: data.count(b"\n")]
    assert list(read(path)) == whole  # The torn line is not read,
    lines = Lines(path)
    for record in after:
        lines.append(record)
    lines.close()
    assert list(read(path)) == whole + after  # nor in the way of the next.


def test_long_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    Lines(path).close()
    assert path.read_bytes() == b'{"a": 1}\n'


def test_what_json_does_not_know(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        lines.append({"a": float("nan")})
    lines.append({"half a surrogate": "\ud800"})
    lines.close()
    assert json.loads((tmp_path / "x.jsonl").read_text("utf-8"))["half a surrogate"] == "\ud800"


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for damage in ("nonsense", "7"):
        path.write_text(f'{{"a": 1}}\n{damage}\n{{"a": 2}}\n')
        with pytest.raises(UserError, match=r"x\.jsonl, line 2 is damaged"):
            list(read(path))


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = Lines(path)
    lines.append({"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # of which the first line takes 9
    try:
        with pytest.raises(NotWritten, match=r"x\.jsonl can't be written"):
            lines.append({"b": "longer than what is left"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines.append({"c": 3})
    lines.close()
    assert list(read(path)) == [{"a": 1}, {"c": 3}]


def test_a_deleted_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = Lines(path)
    lines.check_in_place()
    path.unlink()
    for _ in range(2):  # gone, then another in its place
        with pytest.raises(NotWritten, match="was deleted or replaced"):
            lines.check_in_place()
        path.touch()
    lines.close()
