"""The folder: whole files or none, the user's own, bounded, and never an error."""

import os
from pathlib import Path

import pytest

from qwen_jax.executables.store import Store


def test_a_body_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "folder")
    assert store.get("a") is None
    store.put("a", b"body")
    assert Store(store.folder).get("a") == b"body"
    assert store.folder.stat().st_mode & 0o77 == 0, "what is in it is executed"


@pytest.mark.parametrize("content", [b"", b"\0" * 20, b"\0" * 100])
def test_a_damaged_file_is_absent_and_overwritten(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    (tmp_path / "a").write_bytes(content)
    assert store.get("a") is None
    store.put("a", b"body")
    assert store.get("a") == b"body"


def test_a_cut_file_is_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("a", b"body" * 100)
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[:-1])
    assert store.get("a") is None


def test_somebody_elses_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put("a", b"body")
    owner = (tmp_path / "a").stat().st_uid
    if owner == 0:  # root's files are everybody's
        os.chown(tmp_path / "a", 12345, -1)
        owner = 12345
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert store.get("a") is None


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=3 * (32 + 100))
    for age, name in enumerate("cba"):
        store.put(name, bytes(100))
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    assert store.get("c") is not None, "which makes it the last one used"
    store.put("d", bytes(100))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c", "d"}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    store.put("a", b"body")
    assert store.get("a") is None
