"""Text from bytes: UTF-8, with line breaks and all else as it is.

Python's text mode would make "\\n" of "\\r\\n" and "\\r", which are other tokens.
"""

from pathlib import Path

from qwen_jax import regular_files
from qwen_jax.errors import UserError

_MARK = b"\xef\xbb\xbf"
"""Windows begins files with this, U+FEFF, which is no part of the text."""


def decoded(data: bytes, where: str, *, from_start: bool = True) -> str:
    """The text without the mark that may stand before it.

    Args:
        where: what the bytes are, for messages.
        from_start: these are a file's first bytes; further on the mark is a character.

    Raises:
        UserError: the bytes are no UTF-8.
    """
    start = len(_MARK) if from_start and data.startswith(_MARK) else 0
    try:
        return data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 at byte {start + error.start}; convert it."
        ) from error


def read(path: str | Path) -> str:
    """A file's text. Raises UserError where it can't be read, or is no UTF-8."""
    try:
        data = regular_files.read(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {regular_files.why_not(error)}") from error
    return decoded(data, str(path))


def without_line_break(text: str) -> str:
    """The text without one line break at its end, as `echo` leaves it, here or on Windows."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
