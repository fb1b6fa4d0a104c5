"""Files of prompts, record by record: lines of text or of JSON, or an array of JSON.

A `.jsonl` file holds one object a line with `prompt` or `messages`, and optionally an `id`,
settings of its own, which `prompt_lines.FIELDS` lists, and what is to be carried into its answers;
a `.json` file holds an array of such objects, or of texts; any other file holds one prompt a line.
Lines end with LF or CR LF, and with nothing else; empty ones are skipped. What standard input, `-`,
begins with decides which of these it is.
"""

import collections
import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from qwen_jax import ready_made, regular_files, strict_json, utf8
from qwen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A record that can't be read: why, and those of its fields that are plain all the same."""

    error: UserError
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


Record = tuple[int, str, str | dict[str, Any] | Damaged]
"""A record's number, its place for messages, and its text, or its fields, or what is wrong."""

STDIN = "-"


LINES = (".jsonl", ".ndjson")
"""How the name of a file ends that has one object a line."""


def read(name: str) -> Iterator[Record]:
    """The records of a file, or of standard input, one by one.

    Raises:
        UserError: while iterating: it can't be read, or is no array of JSON where it should be one.
    """
    if name == STDIN:
        data = sys.stdin.buffer.read()
        yield from _records(io.BytesIO(data), "stdin", _begins_as(data))
        return
    suffix = Path(name).suffix.lower()
    kind: Kind = "lines" if suffix in LINES else "array" if suffix == ".json" else "text"
    try:
        with regular_files.opened(ready_made.path(name)) as file:
            yield from _records(file, name, kind)
    except OSError as error:
        why = regular_files.why_not(error)
        raise UserError(f"--prompt_file={name} can't be read: {why}") from error


Kind = Literal["text", "lines", "array"]


def _begins_as(data: bytes) -> Kind:
    """What standard input holds. A prompt that begins as an object or an array of objects or texts
    does is JSON itself, and no prompt."""
    head = re.match(rb'(?:\xef\xbb\xbf)?\s*(?:(\{\s*["}])|(\[\s*[{"\]]))', data)
    return "text" if head is None else "lines" if head[1] else "array"


def _records(file: IO[bytes], name: str, kind: Kind) -> Iterator[Record]:
    if kind == "array":
        yield from _of_array(file.read(), name)
        return
    if kind == "lines":
        _refuse_array(file, name)
    for number, line in enumerate(file, start=1):
        where = f"{name}, line {number}"
        try:
            text = utf8.without_line_break(utf8.decoded(line, where, from_start=number == 1))
            if text.strip():
                yield number, where, text if kind == "text" else _object(text, where)
        except UserError as error:
            yield number, where, Damaged(error, _plain_fields(line) if kind == "lines" else {})


def _refuse_array(file: IO[bytes], name: str) -> None:
    """Raises UserError where lines of JSON are an array: all but one of its lines might be none."""
    filled = (line for line in file if line.strip())
    first, second = next(filled, b""), next(filled, b"")
    file.seek(0)
    if _begins_as(first + second) == "array" and not (second and _is_json(first)):
        raise UserError(
            f"{name} is an array of JSON, but a file of this name has one object a line; name it "
            ".json."
        )


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _plain_fields(line: bytes) -> dict[str, Any]:
    """Of an object with a key twice, what it names once; its id may be among that."""
    try:
        found = json.loads(line, object_pairs_hook=_named_once)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    times = collections.Counter(name for name, _ in pairs)
    return {name: value for name, value in pairs if times[name] == 1}


def _object(text: str, where: str) -> dict[str, Any]:
    # An id may hold half a character, as JavaScript writes some; a prompt that does is refused
    # by the tokenizer.
    return strict_json.parse_object(text, where, allow_nan=True, allow_halves=True)


def _of_array(data: bytes, name: str) -> Iterator[Record]:
    if _begins_as(data) == "lines":
        raise UserError(
            f"{name} begins with an object, but a .json file of prompts must be an array, "
            "[{...}, ...]; name it .jsonl if it has one object a line."
        )
    array = strict_json.parse(data, name, allow_nan=True, allow_halves=True)
    if not isinstance(array, list):
        raise UserError(
            f"{name} holds {array!r:.60}, but a .json file of prompts must be an array, "
            "[{...}, ...]."
        )
    for number, value in enumerate(array, start=1):
        where = f"{name}, item {number}"
        if isinstance(value, str | dict):
            yield number, where, value
        else:
            why = f"{where}: it is {value!r:.60}, but it must be an object, {{...}}, or a text."
            yield number, where, Damaged(UserError(why))
