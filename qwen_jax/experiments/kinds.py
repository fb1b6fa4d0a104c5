"""Which values the fields of records may have, for whoever reads them back: files are edited by
hand, copied between machines and written by programs that somebody else wrote."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """Values of one kind, and how to name them behind "it must be"."""

    said: str
    has: Callable[[Any], bool]


def fault(record: Mapping[str, Any], needed: Mapping[str, Kind]) -> str:
    """What is wrong with the first field that is missing or of another kind; else nothing."""
    for name, kind in needed.items():
        if name not in record:
            return f"it has no {name!r}"
        if not kind.has(record[name]):
            return f"{name!r} is {record[name]!r:.60}, but it must be {kind.said}"
    return ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return type(value) is int and value.bit_length() < 64


def _is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_setting(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(v is None or isinstance(v, str | bool | int | float) for v in values)


TEXT = Kind("a text", _is_text)
NATURAL = Kind("a number from 0 on", _is_natural)
NUMBER = Kind("a finite number", _is_number)
SECONDS = Kind("a number of seconds", lambda value: _is_number(value) and value > 0)
TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
VALUES = Kind(
    "an object of finite numbers",
    lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
)
SETTINGS = Kind(
    "an object of texts, numbers, truth values and lists of them",
    lambda value: isinstance(value, dict) and all(map(_is_setting, value.values())),
)
NAME = Kind(
    # Part of a path: nothing that leads out of the directory in which it is looked for.
    "the name of a file that this program gives, of hexadecimal digits",
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]+", value) is not None,
)


def among(values: Collection[str], said: str) -> Kind:
    return Kind(said, lambda value: isinstance(value, str) and value in values)


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.said} or null", lambda value: value is None or kind.has(value))


def list_of(kind: Kind, count: int | None = None) -> Kind:
    """A list, where `count` is given of so many values."""
    of = "" if count is None else f" of {count} values"
    return Kind(
        f"a list{of}, each {kind.said}",
        lambda value: (
            isinstance(value, list) and count in (None, len(value)) and all(map(kind.has, value))
        ),
    )


def objects(needed: Mapping[str, Kind]) -> Kind:
    """A list of objects with these fields."""
    fields = ", ".join(f"{name} ({kind.said})" for name, kind in needed.items())
    return Kind(
        f"a list of objects with {fields}",
        lambda value: (
            isinstance(value, list)
            and all(isinstance(entry, dict) and not fault(entry, needed) for entry in value)
        ),
    )
