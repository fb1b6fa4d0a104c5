"""A folder of compiled programs, one file each: bounded, and it repairs itself.

A file is a SHA-256 of its body and the body. Whatever is not that is as good as absent, and is
overwritten. Nothing here ever fails for the user: without a store programs are compiled.
"""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from absl import logging

LIMIT = 1 << 30
"""Bytes of a folder. A model's programs for a GPU take some ten megabytes."""


class Store:
    """Bodies by their names.

    Args:
        folder: made with the first body, for its user alone.
        limit: bytes of all files; those whose last use is longest ago go first.
    """

    def __init__(self, folder: Path, limit: int = LIMIT):
        self.folder, self.limit = folder, limit

    def get(self, name: str) -> bytes | None:
        """The body, or None where there is none, or none of this user's."""
        try:
            with (self.folder / name).open("rb") as file:
                # A body is executed. JAX's folder may be one that others can write into.
                if os.fstat(file.fileno()).st_uid not in (0, os.getuid()):
                    logging.debug("%s belongs to somebody else.", file.name)
                    return None
                digest, body = file.read(32), file.read()
            if hashlib.sha256(body).digest() != digest:
                logging.debug("%s is damaged.", self.folder / name)
                return None
            os.utime(self.folder / name)
        except (OSError, AttributeError) as error:  # AttributeError: no user ids on Windows
            logging.debug("%s is not there: %s", name, error)
            return None
        return body

    def put(self, name: str, body: bytes) -> None:
        """Keeps a body, all of it or nothing, and makes room for it."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, written = tempfile.mkstemp(dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(body).digest() + body)
                Path(written).replace(self.folder / name)
            except BaseException:
                Path(written).unlink()
                raise
            self._make_room()
        except OSError as error:
            logging.debug("%s is not kept: %s", name, error)

    def _make_room(self) -> None:
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process makes room as well
                files.append((path.stat(), path))
        left = sum(stat.st_size for stat, _ in files)
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime):
            if left <= self.limit:
                break
            path.unlink(missing_ok=True)
            left -= stat.st_size
