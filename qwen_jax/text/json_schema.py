"""Which keywords of a JSON schema an answer can be held to; others are refused by name.

llguidance passes some over in silence, or takes them for something else.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from qwen_jax import hints
from qwen_jax.errors import UserError

_ONE = ("additionalProperties", "items")
_LISTS = ("anyOf", "allOf", "prefixItems")
_NAMED = ("properties", "$defs", "definitions")
"""Keywords that hold a schema, a list of them, or some by name."""
_PLAIN = (
    *("type", "enum", "const", "required", "$ref"),
    *("minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
)
_SAID = (
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment"),
)
"""They constrain nothing."""
SUPPORTED = (*_ONE, *_LISTS, *_NAMED, *_PLAIN)
FORMATS = (
    *("date-time", "time", "date", "duration", "email", "hostname"),
    *("ipv4", "ipv6", "uuid", "uri"),
)


def check(schema: Mapping[str, Any]) -> None:
    """Raises UserError for what is not supported: its place, and its name."""
    for place, part in _parts(schema, "#", 0):
        if isinstance(part, bool):
            continue
        if not isinstance(part, Mapping):
            raise UserError(f"{place} of the JSON schema is {part!r:.60}; give an object.")
        for name in part:
            if name not in SUPPORTED and name not in _SAID:
                near = hints.meant(str(name), SUPPORTED, 0.85)
                way = f"did you mean {near}?" if near else f"leave it out of {place}."
                raise UserError(
                    f"The JSON schema uses {name!r:.60}, which an answer can't be held to; {way}"
                )
        reference, form = part.get("$ref", "#"), part.get("format", FORMATS[0])
        if not (isinstance(reference, str) and reference.startswith("#")):
            raise UserError(f"{place}/$ref is {reference!r:.60}, but only '#/…' is looked up.")
        if form not in FORMATS:
            known = ", ".join(FORMATS)
            raise UserError(f"{place}/format is {form!r:.60}; an answer can be held to {known}.")


def _parts(schema: Any, place: str, depth: int) -> Iterator[tuple[str, Any]]:
    """A schema and all that it holds, with their places."""
    if depth > 64:
        raise UserError(f"{place:.200} of the JSON schema is nested too deeply.")
    yield place, schema
    if not isinstance(schema, Mapping):
        return
    for name in _ONE:
        if name in schema:
            yield from _parts(schema[name], f"{place}/{name}", depth + 1)
    for name in _LISTS:
        found = schema.get(name, [])
        if not isinstance(found, list):
            raise UserError(f"{place}/{name} is {found!r:.60}, but it must be a list of schemas.")
        for index, part in enumerate(found):
            yield from _parts(part, f"{place}/{name}/{index}", depth + 1)
    for name in _NAMED:
        found = schema.get(name, {})
        if not isinstance(found, Mapping):
            raise UserError(f"{place}/{name} is {found!r:.60}, but it must be an object.")
        for key, part in found.items():
            yield from _parts(part, f"{place}/{name}/{key}", depth + 1)
