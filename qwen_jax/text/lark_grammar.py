"""What a grammar in llguidance's variant of Lark may say.

Settings that would do nothing are refused by name, and so are those of a JSON schema inside of it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qwen_jax import hints, strict_json
from qwen_jax.errors import UserError
from qwen_jax.text import exact_json, json_schema

_OPTIONS = ("no_forcing", "allow_invalid_utf8", "allow_initial_skip", "ignore_once")
"""Of %llguidance."""
_LAYOUT = (
    *("item_separator", "key_separator", "whitespace_flexible", "whitespace_pattern"),
    *("json_allowed_escapes", "json_allow_general_unicode_escapes"),
)
"""Of x-guidance in %json."""
_IDLE = {
    "temperature": "which does nothing: an answer has one, that of its sampling; leave it out",
    "capture": "which nothing reads; leave it out",
    "stop_capture": "which nothing reads; leave it out",
    "stop": "which can't take back what was told already; give suffix or lazy",
}
"""Attributes of a rule that change no answer, or not as they should. llguidance refuses those that
it doesn't know, and keeps to lazy, suffix and max_tokens."""

# What isn't closed is one lexeme, too: to look for its end again and again would take a square.
_LEXEME = re.compile(
    r"""
    (?P<comment> (?:\#|//)[^\n]* )
    | (?P<json> %(?:json|regex|llguidance)\b ) [ \t\r\n]*
    | (?P<text> "(?:\\.|[^"\\\n])*"? | /(?:\\.|[^/\\])+/? )
    | (?P<name> %?[\w-]+ )
    | (?P<space> [ \t\r]+ )
    | (?P<sign> ::|[\s\S] )
    """,
    re.VERBOSE,
)


class _Lexeme(NamedTuple):
    """A word of the grammar, with the JSON behind it, and its line."""

    kind: str
    word: str
    json: str
    line: int


def check(grammar: str) -> None:
    """Raises UserError for a setting that does nothing, or a schema that can't be held to. What is
    no grammar at all is left to llguidance."""
    head: list[_Lexeme] | None = []  # of a statement, as far as its colon
    for lexeme in _lexemes(grammar):
        if lexeme.kind == "json":
            _check_json(lexeme)
        if lexeme.word == "\n":
            head = []
        elif head is not None and lexeme.word == ":":
            _check_attributes(head)
            head = None
        elif head is not None:
            head.append(lexeme)


def _lexemes(grammar: str) -> Iterator[_Lexeme]:
    """Without comments and spaces. A line break ends a statement."""
    at, line = 0, 1
    while found := _LEXEME.match(grammar, at):
        kind, begin, at = str(found.lastgroup), at, found.end()
        held = ""
        if kind == "json":
            try:
                _, at = json.JSONDecoder().raw_decode(grammar, at)
            except (ValueError, RecursionError):
                return  # llguidance says more of it.
            held = grammar[found.end() : at]
        if kind not in ("comment", "space"):
            yield _Lexeme(kind, found[kind], held, line)
        line += grammar.count("\n", begin, at)


def _check_attributes(head: list[_Lexeme]) -> None:
    """Of a rule: what stands in brackets behind its name."""
    words = [lexeme.word for lexeme in head]
    if "[" not in words:
        return
    rule, inside = "".join(words[: words.index("[")]), head[words.index("[") + 1 :]
    for before, lexeme in zip([None, *inside], inside, strict=False):
        if lexeme.word in _IDLE and (before is None or before.word == ","):
            raise UserError(
                f"line {lexeme.line} of the grammar gives {rule:.60} a {lexeme.word}, "
                f"{_IDLE[lexeme.word]}."
            )


def _check_json(lexeme: _Lexeme) -> None:
    where = f"{lexeme.word} in line {lexeme.line} of the grammar"
    if lexeme.word == "%regex":
        return  # whose fields llguidance checks
    found = strict_json.parse_object(lexeme.json, where)
    if lexeme.word == "%llguidance":
        _check_known(found, _OPTIONS, where)
        return
    layout = found.pop("x-guidance", {})
    if isinstance(layout, Mapping):
        _check_known(layout, _LAYOUT, f"x-guidance of {where}")
    try:
        json_schema.check(found)
        if (number := exact_json.changed(found)) is not None:
            raise UserError(
                f"The JSON schema has the number {number!r:.60}, which would be rounded; write it "
                'in the grammar itself, as in "1" | "2", or give a json_schema in its place.'
            )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_known(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in given:
        if name not in known:
            near = hints.meant(name, known, 0.85)
            way = f"did you mean {near}?" if near else f"known are {', '.join(known)}."
            raise UserError(f"{where} has {name!r:.60}, which does nothing; {way}")
