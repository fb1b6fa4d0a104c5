"""SHA-256 of the files a checkpoint is made of, against what its publisher says."""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen_jax.errors import UserError

_CHUNK = 8 << 20

Progress = Callable[[int, int], None]


def sha256(path: Path, progress: Progress | None = None) -> str:
    """The SHA-256 of one file, in hexadecimal; `progress` hears bytes done and in all."""
    digest = hashlib.sha256()
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                if progress:
                    progress(file.tell(), total)
    except OSError as error:
        raise UserError(
            f"{path}: the file cannot be read ({error.strerror}); check the path."
        ) from None
    return digest.hexdigest()


def check_sha256(paths: Sequence[Path], expected: str, progress: Progress | None = None) -> None:
    """Raises UserError unless every file has its hash.

    Args:
        paths: all files of the checkpoint; a hash covers exactly one of them.
        expected: one hash per file, in their order, with commas between.
    """
    hashes = [word.strip().lower() for word in expected.split(",")]
    for word in hashes:
        if not re.fullmatch("[0-9a-f]{64}", word):
            raise UserError(f"sha256: {word!r} is not 64 hexadecimal digits; copy the whole hash.")
    if len(hashes) != len(paths):
        raise UserError(
            f"sha256: {len(hashes)} hash(es) were given, but a hash covers one file and the model "
            f"is {len(paths)} ({', '.join(path.name for path in paths)}); give one for each, in "
            "this order, with commas between."
        )
    for path, word in zip(paths, hashes, strict=True):
        found = sha256(path, progress)
        if found != word:
            raise UserError(
                f"{path}: the SHA-256 is {found}, not {word} as asked; the file is damaged or "
                "another version, so download it again."
            )
