"""Reads the text files of a checkpoint: merges.txt and chat templates."""

from pathlib import Path

from qwen_jax import utf8
from qwen_jax.errors import UserError
from qwen_jax.file_kinds import kind_of, told_by_kind


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises UserError where there is none, or it stands for another."""
    with told_by_kind(path, "text"):
        text = utf8.read(path)
    if kind := kind_of(path, "text"):  # A pointer or a web page is text, too.
        raise UserError(f"{path}: the file is {kind}.")
    return text
