"""A grammar for JSON of a schema with numbers that llguidance would change, as ids of 64 bits.

Where they stand, and around them, the grammar is written out here; all else is llguidance's, by
`%json`. Properties come in the schema's order, as there.
"""

import itertools
import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.text import json_numbers
from qwen_jax.text.json_schema import LAYOUT, SAID, parts

_DEFINITIONS = ("$defs", "definitions")


def changed(schema: Mapping[str, Any]) -> float | None:
    """A number that llguidance would change in a schema that was checked, if there is one."""
    return _Grammar(schema).changed(schema, set())


def grammar(schema: Mapping[str, Any]) -> str | None:
    """In llguidance's variant of Lark; None where llguidance does it right by itself.

    Raises UserError where there are such numbers in what isn't written out here.
    """
    made = _Grammar(schema)
    if made.changed(schema, set()) is None:
        return None
    start = made.rule(schema, "#")
    return "\n".join([f"start: {start}", *(f"{name}: {body}" for name, body in made.rules.items())])


class _Grammar:
    """Rules by their names, terminals in capitals."""

    def __init__(self, root: Mapping[str, Any]):
        self._root = root
        self._names: dict[str, str] = {}
        self.rules: dict[str, str] = {}

    def rule(self, schema: Any, place: str) -> str:
        """The name of what derives a part of the schema."""
        if place not in self._names:  # which a definition may be, too
            name = self._names[place] = f"r{len(self._names)}"
            self.rules[name] = self._body(schema, place)
        return self._names[place]

    def _body(self, schema: Any, place: str) -> str:
        if self.changed(schema, set()) is None:
            return self._theirs(schema, place)
        asked = {name for name in schema if name not in SAID and name not in _DEFINITIONS}
        if "enum" in asked or "const" in asked:
            self._only(asked, ("enum", "const", "type"), place)
            return self._terminal(_written(_values(schema, place)))
        if asked == {"$ref"}:
            return self.rule(self._target(schema["$ref"]), schema["$ref"])
        if asked == {"anyOf"}:
            each = enumerate(schema["anyOf"])
            return " | ".join(self.rule(part, f"{place}/anyOf/{i}") for i, part in each)
        if schema.get("type") == "integer":
            self._only(asked, ("type", *json_numbers.BOUNDS), place)
            return self._terminal(f"/{_whole_numbers(schema, place)}/")
        if schema.get("type") == "object":
            self._only(asked, ("type", "properties", "required", "additionalProperties"), place)
            return self._object(schema, place)
        if schema.get("type") == "array":
            self._only(asked, ("type", "items", "minItems", "maxItems"), place)
            return self._array(schema, place)
        raise self._rounded(f"leave {' and '.join(sorted(asked))} out of {place:.200}")

    def changed(self, schema: Any, seen: set[str]) -> float | None:
        """The first such number that a part has, or what it refers to, if there is one.

        Args:
            seen: references that were followed.
        """
        for _, part in parts(schema, named=("properties",)):
            if not isinstance(part, Mapping):
                continue
            literal = json_numbers.changed([part.get("const"), part.get("enum")])
            for number in itertools.chain(literal, json_numbers.changed_bounds(part)):
                return number
            reference = part.get("$ref")
            if reference is not None and reference not in seen:
                seen.add(reference)
                if (found := self.changed(self._target(reference), seen)) is not None:
                    return found
        return None

    def _target(self, reference: str) -> Any:
        """The part that a reference names; None where there is none, which is llguidance's to
        tell."""
        start, *names = urllib.parse.unquote(reference).split("/")
        found: Any = self._root if start == "#" else None
        for written in names:
            name = written.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def _theirs(self, schema: Any, place: str) -> str:
        """What llguidance does right by itself."""
        if schema is False:
            raise self._rounded(f"leave {place:.200}, which is false, out")
        held = {} if schema is True else dict(schema)
        definitions = {name: self._root[name] for name in _DEFINITIONS if name in self._root}
        within = [part for _, part in parts(held) if isinstance(part, Mapping)]
        references = [part["$ref"] for part in within if "$ref" in part]
        if references:
            if not all(
                one.startswith(tuple(f"#/{n}/" for n in _DEFINITIONS)) for one in references
            ):
                raise self._rounded(f"let each $ref of {place:.200} be to something in $defs")
            held |= definitions
        return f"%json {json.dumps(held | {'x-guidance': LAYOUT})}"

    def _terminal(self, body: str) -> str:
        name = f"T{len(self.rules)}"
        self.rules[name] = body
        return name

    def _object(self, schema: Mapping[str, Any], place: str) -> str:
        """Each property in its turn, as a rule of what may come from it on: `more`, where one
        came before it, or `first`."""
        properties, required = schema.get("properties", {}), schema.get("required", ())
        if schema.get("additionalProperties", True) is not False:
            raise self._rounded(f"set additionalProperties of {place:.200} to false")
        if others := [name for name in required if name not in properties]:
            raise self._rounded(f"make {others[0]!r:.60}, which {place:.200} requires, a property")
        more = first = '""'
        for index, (name, part) in reversed([*enumerate(properties.items())]):
            written = name.replace("~", "~0").replace("/", "~1")
            inner = self.rule(part, f"{place}/properties/{written}")
            key = _literal(f"{json.dumps(name, ensure_ascii=False)}: ")
            skips = name not in required
            also = (f" | {more}" if skips else "", f" | {first}" if skips else "")
            of = f"{self._names[place]}-{index}"
            self.rules[f"{of}-more"] = f'", " {key} {inner} {more}{also[0]}'
            self.rules[f"{of}-first"] = f"{key} {inner} {more}{also[1]}"
            more, first = f"{of}-more", f"{of}-first"
        return f'"{{" {first} "}}"'

    def _array(self, schema: Mapping[str, Any], place: str) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        item = self.rule(schema["items"], f"{place}/items")
        if most is not None and most < least:
            raise UserError(f"{place} of the JSON schema has maxItems below minItems; correct it.")
        if most == 0:
            return '"[]"'
        times = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        some = item if most == 1 else f'{item} (", " {item}){times}'
        return f'"[" {some} "]"' if least else f'"[" ({some})? "]"'

    def _only(self, asked: set[str], known: tuple[str, ...], place: str) -> None:
        if others := sorted(asked.difference(known)):
            raise self._rounded(f"leave {others[0]} out of {place:.200}")

    def _rounded(self, way: str) -> UserError:
        number = self.changed(self._root, set())
        return UserError(
            f"The JSON schema has the number {number!r:.60}, which would be rounded; to keep it, "
            f"{way}, or make it a text."
        )


def _literal(text: str) -> str:
    return json.dumps(text)


def _written(values: list[Any]) -> str:
    return " | ".join(_literal(json.dumps(value, ensure_ascii=False)) for value in values)


def _values(schema: Mapping[str, Any], place: str) -> list[Any]:
    """Those that all of enum, const and type let through."""
    values = schema.get("enum", [schema.get("const")])
    if "const" in schema:
        values = [value for value in values if _same(value, schema["const"])]
    kinds = schema.get("type", list(_TYPES))
    named = [kinds] if isinstance(kinds, str) else kinds
    if found := [value for value in values if any(_TYPES[kind](value) for kind in named)]:
        return found
    raise UserError(f"{place} of the JSON schema lets no value through; correct it.")


def _same(one: Any, other: Any) -> bool:
    """As JSON has it: 1 is 1.0, and not true."""
    return json.dumps(one) == json.dumps(other) or (json_numbers.is_number(one) and one == other)


_TYPES = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: json_numbers.is_number(value) and value == int(value),
    "number": json_numbers.is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, Mapping),
}


def _whole_numbers(schema: Mapping[str, Any], place: str) -> str:
    """An expression for the integers within the bounds."""
    least: list[float] = []
    most: list[float] = []
    for name, bounds, step in (("inimum", least, 1), ("aximum", most, -1)):
        bound, beyond = schema.get(f"m{name}"), schema.get(f"exclusiveM{name}")
        if isinstance(beyond, bool):  # of drafts before the sixth
            bound, beyond = (None, bound) if beyond else (bound, None)
        if bound is not None:
            bounds.append(-(-bound // 1) if step == 1 else bound // 1)
        if beyond is not None:
            bounds.append(beyond // 1 + 1 if step == 1 else -(-beyond // 1) - 1)
    low = int(max(least)) if least else None
    high = int(min(most)) if most else None
    if low is not None and high is not None and low > high:
        raise UserError(
            f"{place} of the JSON schema has no integer between its bounds; correct it."
        )
    found = []
    if low is None or low < 0:
        nearest = 1 if high is None or high >= 0 else -high
        found.append(f"-{_digits(nearest, None if low is None else -low)}")
    if high is None or high >= 0:
        found.append(_digits(max(low or 0, 0), high))
    return f"({'|'.join(found)})"


def _digits(low: int, high: int | None) -> str:
    """An expression for low to high, neither below 0; None has no end."""
    shortest, length = len(str(low)), len(str(low if high is None else high))
    found = []
    for count in range(shortest, length + 1):
        first = str(low) if count == shortest else f"1{'0' * (count - 1)}"
        last = str(high) if high is not None and count == length else "9" * count
        found.append(_alike(first, last))
    if high is None:
        found.append(f"[1-9][0-9]{{{length},}}")
    return f"({'|'.join(found)})"


def _alike(low: str, high: str) -> str:
    """The same of numbers with as many digits."""
    if low == high:
        return low
    behind = len(low) - 1
    if low[0] == high[0]:
        return f"{low[0]}{_alike(low[1:], high[1:])}"
    found, first, last = [], int(low[0]), int(high[0])
    if low[1:].strip("0"):
        found.append(f"{low[0]}{_alike(low[1:], '9' * behind)}")
        first += 1
    if high[1:].strip("9"):
        found.append(f"{high[0]}{_alike('0' * behind, high[1:])}")
        last -= 1
    if first <= last:
        found.append(f"[{first}-{last}][0-9]{{{behind}}}")
    return f"({'|'.join(found)})"
