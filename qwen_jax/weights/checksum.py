"""SHA-256 of the files a checkpoint is made of, against what its publisher says."""

import re
from collections.abc import Sequence
from pathlib import Path

from qwen_jax.errors import UserError
from qwen_jax.weights.open_files import OpenFiles, Progress


def hashes_of(expected: str) -> list[str]:
    """Hashes with commas between. Raises UserError where one is none."""
    hashes = [word.strip().lower() for word in expected.split(",")]
    for word in hashes:
        if not re.fullmatch("[0-9a-f]{64}", word):
            raise UserError(
                f"sha256: {word!r:.80} is not 64 hexadecimal digits; copy the whole hash."
            )
    return hashes


def check_sha256(
    opened: OpenFiles, paths: Sequence[Path], expected: str, progress: Progress | None = None
) -> None:
    """Raises UserError unless every file has its hash.

    Args:
        opened: where they are read, now and afterwards.
        paths: all files of the checkpoint; a hash covers exactly one of them.
        expected: one hash per file, in their order, with commas between.
    """
    hashes = hashes_of(expected)
    if len(hashes) != len(paths):
        raise UserError(
            f"sha256: {len(hashes)} hash(es) were given, but a hash covers one file and the model "
            f"is {len(paths)} ({', '.join(path.name for path in paths)}); give one for each, in "
            "this order, with commas between."
        )
    for path, word in zip(paths, hashes, strict=True):
        found = opened[path].sha256(progress)
        if found != word:
            raise UserError(
                f"{path}: the SHA-256 is {found}, not {word} as asked; the file is damaged or "
                "another version, so download it again."
            )
