"""Opening what a user named: a pipe would be waited for, and a device never ends."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MOST_BYTES = 100_000_000
"""What is read whole: the bound of the safetensors header in its own reader. A Qwen2.5
tokenizer.json has 7 MB."""

MOST_OF_CONFIG = 16_000_000
"""What only describes something: 100 MB of empty lists would become 2 GB. A Qwen2.5
tokenizer_config.json, the largest of them, has 7 kB, and an index of 72B's shards 80 kB."""

_OTHERS = {
    stat.S_IFIFO: "it is a pipe, and no file",
    stat.S_IFCHR: "it is a device, and no file",
    stat.S_IFBLK: "it is a device, and no file",
}

_WAYS = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.ENAMETOOLONG: "check the path",
}

_ROOM = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "allow larger files (ulimit -f)",
}


def is_there(path: Path) -> bool:
    """Whether something of that name is to be read. A pipe or a device is, and will be refused:
    what it might have said is not passed over in silence. A directory is something else."""
    return path.exists() and not path.is_dir()


def opened(path: str | Path) -> BinaryIO:
    """A file open to be read. Raises OSError where it can't be, or is no regular file."""
    if "\0" in str(path):  # Python's own words for it are no OSError.
        raise OSError(errno.EINVAL, "its name has a NUL character", str(path))
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
    if kind != stat.S_IFREG:
        file.close()
        raise OSError(errno.EINVAL, _OTHERS.get(kind, "it is no file"), str(path))
    return file


def read(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """All of a file. Raises OSError where it is none, can't be read or has more bytes."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return data


def resolved(path: Path) -> Path:
    """The path without links, where they end: of those that run in a circle, `Path.resolve` raises
    what is no OSError."""
    return Path(os.path.realpath(path))


def why_not(error: OSError) -> str:
    """What keeps a file from being read, and the way out, to follow "can't be read: "."""
    way = _WAYS.get(error.errno or 0, "give another file")
    return f"{error.strerror or error}; {way}."


def why_taken(path: Path, example: str) -> str | None:
    """Why no new file can have that name, to follow "--flag=name "; None where one can.

    Args:
        example: the name of such a file.
    """
    try:
        if path.is_dir():
            return f"is a directory; name a file in it, as in {path / example}."
        if path.exists():
            return "exists already; move it or choose another name."
        if not path.parent.is_dir():
            return f"can't be written: {path.parent} is no directory; choose another place."
        return None
    except OSError as error:  # as of a directory that may not be entered
        return f"can't be written: {why_not_written(error)}"


def why_not_written(error: OSError, then: str = "") -> str:
    """The same of a file or a directory, to follow "can't be written: ".

    Args:
        then: what follows the way out, as in ", and --resume goes on".
    """
    way = _ROOM.get(error.errno or 0, "choose another place")
    return f"{error.strerror or error}; {way}{then}."


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
