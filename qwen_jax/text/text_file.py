"""Reads the text files of a checkpoint: merges.txt and chat templates."""

from pathlib import Path

from qwen_jax.errors import UserError
from qwen_jax.file_kinds import kind_of


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises UserError where there is none, or it stands for another."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: the file is {kind_of(path, 'text') or f'not UTF-8 at byte {error.start}'}."
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: the file cannot be read ({error.strerror}); check that it is there and "
            "yours to read."
        ) from None
    if kind := kind_of(path, "text"):
        raise UserError(f"{path}: the file is {kind}.")
    return text
