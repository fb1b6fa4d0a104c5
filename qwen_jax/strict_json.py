"""The one reader of JSON that others wrote: an object, each of its keys once.

Python's reader keeps the last of several values, so a file with a key twice says two things and
one of them would be ignored in silence.
"""

import collections
import json
import re
from pathlib import Path
from typing import Any

from qwen_jax import regular_files, utf8
from qwen_jax.errors import UserError
from qwen_jax.file_kinds import Expected, told_by_kind


def read_object(
    path: Path,
    *,
    most: int = regular_files.MOST_OF_CONFIG,
    allow_nan: bool = False,
    allow_halves: bool = False,
    expected: Expected = "JSON",
) -> dict[str, Any]:
    """The JSON object in the file of `most` bytes at most, which is to be of that kind; the other
    arguments are `parse_object`'s. Raises UserError for anything else, or where there is none."""
    try:
        text = regular_files.read(path, most)
    except OSError as error:
        raise UserError(f"{path}: the file can't be read: {regular_files.why_not(error)}") from None
    with told_by_kind(path, expected):
        return parse_object(text, str(path), allow_nan=allow_nan, allow_halves=allow_halves)


def read_object_if_there(path: Path, *, allow_nan: bool = False) -> dict[str, Any]:
    """The same of a file that need not be there: then {}. One that is there and can't be read, such
    as a pipe, is not passed over in silence."""
    return read_object(path, allow_nan=allow_nan) if regular_files.is_there(path) else {}


def parse_object(
    text: bytes | str, source: str, *, allow_nan: bool = False, allow_halves: bool = False
) -> dict[str, Any]:
    """The JSON object in `text`, UTF-8 with or without a byte order mark.

    Args:
        source: what the text is, for messages: a file, or a file and its line.
        allow_nan: reads NaN and Infinity, which are no JSON, as Python and therefore
            transformers do; whoever takes a number has to check it.
        allow_halves: reads lone surrogates, which are JSON but no Unicode; whoever writes such a
            text has to escape it.

    Raises:
        UserError: the text is no JSON object, or names a key twice.
    """
    value = parse(text, source, allow_nan=allow_nan, allow_halves=allow_halves)
    if not isinstance(value, dict):
        raise UserError(f"{source}: it is {written(value)}, but it must be a JSON object, {{...}}.")
    return value


def written(value: Any, most: int = 60) -> str:
    """A value as JSON has it, for messages, cut to so many characters; what is none is written as
    Python has it."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def parse(
    text: bytes | str, source: str, *, allow_nan: bool = False, allow_halves: bool = False
) -> Any:
    """Whatever value the JSON in `text` has; the arguments are `parse_object`'s.

    Raises:
        UserError: the text is no JSON, or names a key twice.
    """
    try:
        decoded = utf8.decoded(text, f"{source}: it") if isinstance(text, bytes) else text
        value = json.loads(
            decoded,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_constant=float if allow_nan else _no_number,
        )
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in decoded else ""
        raise UserError(
            f"{source}: it is not JSON ({error.msg} at {line}column {error.colno}); correct it, or "
            "get the original again."
        ) from None
    except RecursionError:
        raise UserError(f"{source}: its JSON is nested too deeply to be read.") from None
    except _RefusedError as error:
        raise UserError(f"{source}: {error}.") from None
    if not allow_halves and (half := _half_a_character(decoded, value)):
        raise UserError(f"{source}: it holds {half}, half a character without its other half.")
    return value


def _half_a_character(text: str, value: Any) -> str:
    r"""The first lone surrogate such as `\ud800`, which no text in UTF-8 can hold; else ""."""
    if not re.search(r"\\u[dD][89a-fA-F]", text):
        return ""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return repr(error.object[error.start])[1:-1]
    return ""


class _RefusedError(Exception):
    """What Python's reader would have let pass."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
        raise _RefusedError(f"the key {twice!r:.80} appears twice; keep one of them")
    return found


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python reads 4,300 digits.
        raise _RefusedError(
            f"the number {digits:.20}... has {len(digits)} digits; correct it"
        ) from None


def _no_number(name: str) -> float:
    raise _RefusedError(f"{name} is no number of JSON; correct it")
