"""Which keywords of a JSON schema an answer can be held to; others are refused by name.

llguidance passes some over in silence, or takes them for something else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qwen_jax import hints
from qwen_jax.errors import UserError
from qwen_jax.text import json_numbers

LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it: a model that may put white space anywhere may write nothing else."""
_ONE = ("additionalProperties", "items")
_LISTS = ("anyOf", "allOf", "prefixItems")
_NAMED = ("properties", "$defs", "definitions")
"""Keywords that hold a schema, a list of them, or some by name."""
_PLAIN = (
    *("type", "enum", "const", "required", "$ref"),
    *("minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)
SAID = (
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment"),
)
"""They constrain nothing."""
SUPPORTED = (*_ONE, *_LISTS, *_NAMED, *_PLAIN)
FORMATS = (
    *("date-time", "time", "date", "duration", "email", "hostname"),
    *("ipv4", "ipv6", "uuid", "uri"),
)
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


def _is_natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_types(value: object) -> bool:
    named = value if isinstance(value, list) else [value]
    return bool(named) and all(isinstance(kind, str) and kind in TYPES for kind in named)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


_MUST: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_types, f"one of {', '.join(TYPES)}, or a list of some"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list of at least one value"),
    "required": (_are_texts, "a list of texts"),
    "pattern": (lambda value: isinstance(value, str), "a text"),
    **dict.fromkeys(
        ("minItems", "maxItems", "minLength", "maxLength"),
        (_is_natural, "a whole number from 0 on"),
    ),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), (json_numbers.is_number, "a number")),
    **dict.fromkeys(
        ("exclusiveMinimum", "exclusiveMaximum"),
        (lambda value: isinstance(value, bool) or json_numbers.is_number(value), "a number"),
    ),
}
"""What some keywords must be, and in words."""


def check(schema: Mapping[str, Any]) -> None:
    """Raises UserError for what is not supported: its place, and its name."""
    multiples: set[float] = set()
    merged = False
    for place, part in parts(schema):
        if isinstance(part, bool):
            continue
        if not isinstance(part, Mapping):
            raise UserError(f"{place} of the JSON schema is {part!r:.60}; give an object.")
        for name in part:
            if name not in SUPPORTED and name not in SAID:
                near = hints.meant(str(name), SUPPORTED, 0.85)
                way = f"did you mean {near}?" if near else f"leave it out of {place}."
                raise UserError(
                    f"The JSON schema uses {name!r:.60}, which an answer can't be held to; {way}"
                )
            if name in _MUST and not _MUST[name][0](part[name]):
                raise UserError(
                    f"{place}/{name} of the JSON schema is {part[name]!r:.60}, but it must be "
                    f"{_MUST[name][1]}."
                )
        reference, form = part.get("$ref", "#"), part.get("format", FORMATS[0])
        if not (isinstance(reference, str) and reference.startswith("#")):
            raise UserError(f"{place}/$ref is {reference!r:.60}, but only '#/…' is looked up.")
        if form not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"{place}/format is {form!r:.60}; an answer can be held to {known}.")
        json_numbers.check(part, place)
        multiples |= {part["multipleOf"]} if "multipleOf" in part else set()
        merged |= not part.keys().isdisjoint(("allOf", "anyOf", "$ref"))
    if merged:
        json_numbers.check_together(multiples)


def parts(
    schema: Any, place: str = "#", depth: int = 0, named: Sequence[str] = _NAMED
) -> Iterator[tuple[str, Any]]:
    """A schema and all that it holds, with their places.

    Args:
        named: which of the keywords that hold schemas by name are looked into.
    """
    if depth > 64:
        raise UserError(f"{place:.200} of the JSON schema is nested too deeply.")
    yield place, schema
    if not isinstance(schema, Mapping):
        return
    for name in _ONE:
        if name in schema:
            yield from parts(schema[name], f"{place}/{name}", depth + 1, named)
    for name in _LISTS:
        found = schema.get(name, [])
        if not isinstance(found, list):
            raise UserError(f"{place}/{name} is {found!r:.60}, but it must be a list of schemas.")
        for index, part in enumerate(found):
            yield from parts(part, f"{place}/{name}/{index}", depth + 1, named)
    for name in named:
        found = schema.get(name, {})
        if not isinstance(found, Mapping):
            raise UserError(f"{place}/{name} is {found!r:.60}, but it must be an object.")
        for key, part in found.items():
            yield from parts(part, f"{place}/{name}/{key}", depth + 1, named)
