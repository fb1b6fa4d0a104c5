"""Files of JSON lines that survive `kill -9`: a line is there whole, or not at all."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.regular_files import why_not_written

_BLOCK = 1 << 16


class NotWritten(UserError):
    """Records can't be kept any more, so that there is no use in going on."""


class Lines:
    """A file to which lines are added. What a killed process left of a line is cut off first."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            _sync_directory(path.parent)
        except OSError as error:
            raise NotWritten(f"{path} can't be written: {why_not_written(error)}") from error
        size = os.fstat(self._file).st_size
        if (end := self._end_of_last_line(size)) < size:
            os.ftruncate(self._file, end)

    def _end_of_last_line(self, size: int) -> int:
        while size > 0:
            start = max(0, size - _BLOCK)
            newline = os.pread(self._file, size - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            size = start
        return 0

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record; it is the system's, and no longer this process's, when this returns.

        Raises ValueError for NaN and infinity, which JSON doesn't know.
        """
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        # Half of a surrogate pair, as a prompt's id may hold, becomes its JSON escape.
        data = memoryview((text + "\n").encode("utf-8", "backslashreplace"))
        end = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            # A full disk takes half a line, on which the next one would continue.
            os.ftruncate(self._file, end)
            raise NotWritten(f"{self.path} can't be written: {why_not_written(error)}") from error

    def check_in_place(self) -> None:
        """Raises NotWritten where the file was deleted or replaced: what is added would be lost."""
        try:
            there = os.path.samestat(self.path.stat(), os.fstat(self._file))
        except OSError:
            there = False
        if not there:
            raise NotWritten(f"{self.path} was deleted or replaced while it was being written.")

    def sync(self) -> None:
        """Waits until the disk has what was added, for the day the power fails."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


Record = dict[str, Any]


def read(
    path: Path, containing: bytes = b"", *, needs: Callable[[Record], Sequence[str]] | None = None
) -> Iterator[Record]:
    """The records of a file one by one, only those whose line contains the given bytes.

    A last line without its end is left out: a process writes it now, or was killed.

    Raises UserError where a line is no JSON object, or lacks a field that `needs` names for it.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or containing not in line:
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(_damaged(path, number, str(error))) from error
            if not isinstance(record, dict):
                raise UserError(_damaged(path, number, "it is no object"))
            if needs and (lacking := [name for name in needs(record) if name not in record]):
                raise UserError(_damaged(path, number, f"it has no {lacking[0]!r}"))
            yield record


def _damaged(path: Path, number: int, why: str) -> str:
    return f"{path}, line {number} is damaged ({why}); delete the line, or restore the file."


def write_atomically(path: Path, text: str) -> None:
    """Puts a whole file in its place at once. Raises NotWritten where that fails."""
    write_pieces(path, [text.encode("utf-8", "backslashreplace")])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """The same of a file that needn't be in memory as a whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.writelines(pieces)
        put(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise NotWritten(f"{path} can't be written: {why_not_written(error)}") from error


def put(temporary: Path, path: Path) -> None:
    """Gives a file that is complete its name, once the disk has it."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Waits until the disk has the names in a directory."""
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
