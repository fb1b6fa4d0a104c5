"""A checkpoint's files, each opened once: what is hashed, what the header says and the weights are
then the bytes of one file, whatever takes its name meanwhile.

A file that is written where it lies, as `cp` does, is another thing: it shrinks under its memory
map, which ends the process where the missing bytes are touched (SIGBUS), or its bytes change. So
its size and its time are looked at before bytes are given out (1 us), and when all are read.
"""

import hashlib
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from qwen_jax import regular_files
from qwen_jax.errors import UserError

Progress = Callable[[int, int], None]

_CHUNK = 8 << 20


class OpenFile:
    """A file that is open, and memory-mapped read-only in `map`.

    Args:
        state: its size and time when it was opened before; by default it is opened now.

    Raises:
        UserError: it can't be read, is no regular file, is empty or another one than before.
    """

    def __init__(self, path: Path, state: tuple[int, int] | None = None):
        self.path = path
        try:
            with regular_files.opened(path) as file:
                self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
                self._state = self._now()
                self.map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise UserError(f"{path}: the file is empty; download or copy it again.") from None
        except OSError as error:
            raise UserError(
                f"{path}: the file can't be read: {regular_files.why_not(error)}"
            ) from None
        self._bytes = np.frombuffer(self.map, np.uint8)
        if state is not None:
            self._state = state
            self.check()

    def bytes(self, start: int, stop: int) -> UInt8[np.ndarray, "n"]:
        """A read-only view of the map. Raises UserError where the file has changed."""
        self.check()
        return self._bytes[start:stop]

    def check(self) -> None:
        """Raises UserError where the file is not what it was when it was opened."""
        if (state := self._now()) != self._state:
            (size, _), (before, _) = state, self._state
            sizes = f"it has {size} bytes, and had {before}" if size != before else "same size"
            raise UserError(
                f"{self.path}: the file was written to while it was read ({sizes}); wait until "
                "that is done, and start again."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens it again, and refuses another file."""
        return OpenFile, (self.path, self._state)

    def sha256(self, progress: Progress | None = None) -> str:
        """The SHA-256 of the file in hexadecimal; `progress` hears bytes done and in all."""
        digest, done, total = hashlib.sha256(), 0, len(self.map)
        # Minutes for a large file, in which the map would not be safe from one that shrinks.
        while chunk := os.pread(self._file, _CHUNK, done):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done, total)
        self.check()
        return digest.hexdigest()

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._file)
        return state.st_size, state.st_mtime_ns


class OpenFiles(dict[Path, OpenFile]):
    """Files by path, opened when they are first asked for."""

    def __missing__(self, path: Path) -> OpenFile:
        self[path] = OpenFile(path)
        return self[path]

    def check(self) -> None:
        """`OpenFile.check` of all of them."""
        for file in self.values():
            file.check()
