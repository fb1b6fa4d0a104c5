"""A function in another process: its result, its errors, its progress and its end."""

import errno
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qwen_jax.accuracy.child import Child, SharedArrays
from qwen_jax.accuracy.finding import Progress
from qwen_jax.errors import UserError
from qwen_jax.weights.open_files import OpenFile

HELD = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bfloat16": np.linspace(-3, 3, 77).astype(ml_dtypes.bfloat16).reshape(7, 11),
    "empty": np.zeros((0, 4), np.float16),
    "transposed": np.arange(12, dtype=np.int32).reshape(3, 4).T,
}

BEGUN = """
from qwen_jax.accuracy.child import Child
from tests.accuracy.test_child import wait
child = Child(wait)
"""


def twice(x: SharedArrays, times: int = 2, progress: Progress | None = None) -> dict[str, Any]:
    for done in range(times):
        assert progress
        progress(done + 1, times)
    return {name: (value, value.dtype.name, os.getpid()) for name, value in x.items()}


def refuse(x: int, progress: Progress | None = None) -> None:
    raise UserError(f"{x}: it is too large; take a smaller one.")


def die(progress: Progress | None = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait(progress: Progress | None = None) -> None:
    time.sleep(600)


def print_much(progress: Progress | None = None) -> str:
    print("as a library may")
    os.write(1, b"or C\n")
    return "done"


def give_what_cannot_be_sent(progress: Progress | None = None) -> object:
    return lambda: None


class NeedsTwo(Exception):
    def __init__(self, one: int, two: int):
        super().__init__(f"{one} and {two}")


def raise_what_cannot_be_sent(progress: Progress | None = None) -> None:
    raise NeedsTwo(1, 2)


def break_down(progress: Progress | None = None) -> float:
    return 1 / 0


def have_no_room(progress: Progress | None = None) -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_arrays_are_seen_where_they_lie() -> None:
    given, shared = dict(HELD), SharedArrays()
    child = Child(twice, shared)  # before they are there
    told: list[tuple[int, int]] = []
    found = child(shared.take(given), 3, progress=lambda *n: told.append(n))
    assert not given and found.keys() == HELD.keys()
    for name, (value, dtype, process) in found.items():
        assert np.array_equal(value, HELD[name]) and dtype == HELD[name].dtype.name
        assert np.array_equal(shared[name], HELD[name]) and not shared[name].flags.writeable
        assert process != os.getpid()
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_an_error_is_raised_here() -> None:
    with pytest.raises(UserError, match=r"^7: it is too large; take a smaller one\.$"):
        Child(refuse)(7)


def test_memory_that_is_lacking_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an error without a file the command line would say that stdout is full."""
    lacking = r"can't share the work with another process: .* memory; free some memory\."
    with pytest.raises(UserError, match=lacking):
        Child(have_no_room)()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: have_no_room())
    with pytest.raises(UserError, match=lacking):
        Child(have_no_room)


def test_what_is_printed_is_no_progress(capfd: pytest.CaptureFixture[str]) -> None:
    assert Child(print_much)() == "done"
    out, err = capfd.readouterr()
    assert out == "" and sorted(err.splitlines()) == ["as a library may", "or C"]


def test_what_cannot_be_sent_is_told() -> None:
    with pytest.raises(Exception, match="pickle"):
        Child(give_what_cannot_be_sent)()
    with pytest.raises(RuntimeError, match=r"NeedsTwo: 1 and 2"):
        Child(raise_what_cannot_be_sent)()


def test_a_fault_of_ours_says_where() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        Child(break_down)()
    assert "in break_down" in raised.value.__notes__[0]


def test_arguments_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    """A file that another one has replaced, say."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    file, child = OpenFile(path), Child(twice)
    path.write_bytes(b"another")
    with pytest.raises(UserError, match=f"{path}: the file was written to while it was read"):
        child(file)  # type: ignore[arg-type]


def test_one_that_is_ended_before_its_call() -> None:
    child = Child(wait)
    child._process.kill()
    with pytest.raises(UserError, match="ended with the code -9"):
        child()


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(UserError, match="the process that ran die ended with the code -9"):
        Child(die)()


def test_it_ends_with_whoever_began_it() -> None:
    """Also where that one is killed, which can't do anything about it."""
    program = f"{BEGUN}print(child._process.pid, flush=True)\nchild()"
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    with parent:
        parent.kill()
    ended = select.poll()
    ended.register(child, select.POLLIN)
    assert ended.poll(60_000)


def test_one_that_is_never_called_ends_quietly() -> None:
    program = BEGUN
    ended = subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning", "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
        check=True,
    )
    assert ended.stderr == ""
