"""Files of JSON lines that survive `kill -9`: a line is there whole, or not at all."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qwen_jax import regular_files, strict_json
from qwen_jax.errors import UserError
from qwen_jax.regular_files import why_not_written

_BLOCK = 1 << 16
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


class NotWritten(UserError):
    """Records can't be kept any more, so that there is no use in going on."""


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Writes `path` within. Raises NotWritten where the system refuses, as on a full disk."""
    try:
        yield
    except OSError as error:  # That of a full disk doesn't know the file.
        raise NotWritten(f"{path} can't be written: {why_not_written(error)}") from error


class Lines:
    """A file to which lines are added. What a killed process left of a line is cut off first."""

    def __init__(self, path: Path):
        self.path, self._unsynced = path, False
        with written(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            _sync_directory(path.parent)
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
        text = _ENCODER.encode(record)
        # Half of a surrogate pair, as a prompt's id may hold, becomes its JSON escape.
        data = memoryview((text + "\n").encode("utf-8", "backslashreplace"))
        end = os.fstat(self._file).st_size
        self._unsynced = True
        with written(self.path):
            try:
                while data:
                    data = data[os.write(self._file, data) :]
            except OSError:
                # A full disk takes half a line, on which the next one would continue.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, end)
                raise

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
        if self._unsynced:
            self._unsynced = False  # before, since another thread may add meanwhile
            with written(self.path):
                os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


Record = dict[str, Any]


def read(
    path: Path, containing: bytes = b"", *, fault: Callable[[Record], str] = lambda record: ""
) -> Iterator[Record]:
    """The records of a file one by one, only those whose line contains the given bytes.

    A last line without its end is left out: a process writes it now, or was killed.

    Args:
        fault: what is wrong with a record, in words, or nothing.

    Raises:
        UserError: a line is no JSON object, or has a fault; or the file can't be read.
    """
    for number, line in enumerate(whole(path), start=1):
        if containing not in line:
            continue
        where = f"{path}, line {number} is damaged"
        record = strict_json.parse_object(line[:-1], where, allow_halves=True)
        if wrong := fault(record):
            raise UserError(f"{where}: {wrong}; delete the line, or restore the file.")
        yield record


def whole(path: Path) -> Iterator[bytes]:
    """The lines of a file, if it is there, but for a last one without its end."""
    if not path.exists():
        return
    most = regular_files.MOST_BYTES
    try:
        with regular_files.opened(path) as file:
            while line := file.readline(most + 1):
                if len(line) > most:
                    raise UserError(
                        f"{path} has a line of more than {most} bytes; delete it, or restore the "
                        "file."
                    )
                if line.endswith(b"\n"):
                    yield line
    except OSError as error:
        raise UserError(f"{path} can't be read: {regular_files.why_not(error)}") from error


def write_atomically(path: Path, text: str) -> None:
    """Puts a whole file in its place at once. Raises NotWritten where that fails."""
    write_pieces(path, [text.encode("utf-8", "backslashreplace")])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """The same of a file that needn't be in memory as a whole."""
    with placed(path) as temporary, temporary.open("wb") as file:
        file.writelines(pieces)


@contextlib.contextmanager
def placed(path: Path) -> Iterator[Path]:
    """Where to write what `path` is to be: it gets that name when it is complete, or it goes.

    Raises NotWritten where that fails.
    """
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # It keeps its ending.
    try:
        with written(path):
            yield temporary
            _put(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _put(temporary: Path, path: Path) -> None:
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
