"""stdin, stdout and stderr that are closed, full or in another encoding."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax.errors import UserError
from tests.cli.conftest import Run

pytestmark = pytest.mark.usefixtures("loaded")


def pipe_without_reader() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("argv", [[], ["inspect"], ["--help"], ["--n=2"]])
def test_a_reader_that_has_gone(run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe_without_reader())
        result = run(*argv)
        sys.stdout.close()
    assert result.code == 0
    assert "error" not in result.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("argv", [[], ["inspect"], ["--help"]])
def test_a_full_disk(run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Path("/dev/full").open("w"))  # noqa: SIM115
        result = run(*argv)
        sys.stdout.close()
    assert result.code == 2
    said = "error: stdout can't be written: No space left on device; make room.\n"
    assert result.err.endswith(said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("argv", [["--temp=1"], ["--max_tokens=1"]])
def test_a_full_disk_for_messages(
    run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Path("/dev/full").open("w", buffering=1))  # noqa: SIM115
        assert run(*argv).code == 2
        with contextlib.suppress(OSError):
            sys.stderr.close()


def test_a_file_that_nobody_was_ready_to_fail(
    refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "some\x1bfile")

    monkeypatch.setattr("qwen_jax.tasks.inspect.memory_lines", fail)
    said = "error: some\\x1bfile can't be used: Permission denied; change its permissions."
    refuses(["inspect"], said)


def test_closed_streams(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, None)
            assert run("--prompt=-" if name == "stdin" else "--max_tokens=1").code in (0, 2)


def test_utf8_in_an_ascii_locale(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
        assert run("--prompt=Write a haiku about é.").code == 0
        assert "é" in content.getvalue().decode("utf-8")


def test_inspect_writes_all_or_nothing(
    refuses: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise UserError("there is a problem.")

    monkeypatch.setattr("qwen_jax.tasks.inspect.memory_lines", fail)
    refuses(["inspect"], "there is a problem")
