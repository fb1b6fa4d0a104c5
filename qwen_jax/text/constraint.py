"""What an answer may look like."""

import dataclasses
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from qwen_jax import strict_json
from qwen_jax.errors import UserError
from qwen_jax.text import exact_json, json_schema, lark_grammar

Kind = Literal["json_schema", "json_object", "regex", "choice", "lark"]

_ROOT = "the JSON schema"
_ANY_OBJECT = '{"type": "object"}'


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What all of an answer must be. Build one by its class methods.

    Attributes:
        kind: which of them.
        text: the schema, expression, grammar or choices, as JSON where they are objects.
        source: the file or flag that it comes from, for messages.

    Raises:
        UserError: it makes no sense, as far as that is known without a model.
    """

    kind: Kind
    text: str
    source: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            known = ", ".join(get_args(Kind))
            raise UserError(f"kind is {self.kind!r:.60}, but it must be one of {known}.")
        if not isinstance(self.text, str):
            raise UserError(f"{self.kind} is {self.text!r:.60}, but it must be a text.")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            half = repr(self.text[error.start])[1:-1]
            raise UserError(
                f"{self.kind} holds {half}, half a character without its other half; correct it."
            ) from error
        if self.kind == "json_schema":
            schema = strict_json.parse_object(self.text, _ROOT)
            json_schema.check(schema)
            exact_json.grammar(schema)
        elif self.kind == "json_object" and self.text != _ANY_OBJECT:
            raise UserError(f"json_object is {self.text!r:.60}; give a json_schema.")
        elif self.kind == "choice":
            _check_choices(strict_json.parse(self.text, "choice"))
        elif self.kind == "lark":
            lark_grammar.check(self.text)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> "Constraint":
        """JSON of a schema. Raises UserError where the schema is none, or uses what is not
        supported, which is named."""
        found = strict_json.parse_object(schema, _ROOT) if isinstance(schema, str) else schema
        if not isinstance(found, Mapping):
            raise UserError(f"{_ROOT} is {found!r:.60}, but it must be an object.")
        return cls("json_schema", _as_json(dict(found), _ROOT))

    @classmethod
    def json_object(cls) -> "Constraint":
        """Any object of JSON."""
        return cls("json_object", _ANY_OBJECT)

    @classmethod
    def regex(cls, expression: str) -> "Constraint":
        """What a regular expression of Rust's matches, as a whole."""
        return cls("regex", expression)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Constraint":
        """One of some texts. Raises UserError where there is none, or one is empty."""
        if isinstance(texts, Iterable) and not isinstance(texts, str | bytes | Mapping):
            texts = list(texts)
        _check_choices(texts)
        return cls("choice", _as_json(texts, "choice"))

    @classmethod
    def lark(cls, grammar: str) -> "Constraint":
        """What a grammar in llguidance's variant of Lark derives from `start`. Raises UserError
        where it has settings that do nothing."""
        return cls("lark", grammar)


FIELDS: dict[str, tuple[type, ...]] = {
    "json_schema": (dict,),
    "json_object": (bool,),
    "regex": (str,),
    "choice": (list,),
    "lark": (str,),
}
"""How somebody asks for a constraint by name, and the types."""


def constraint_of(given: Mapping[str, Any]) -> Constraint | None:
    """The one that some fields ask for; None, False and () ask for none. Raises UserError where
    several do, or it makes no sense."""
    asked = {k: v for k, v in given.items() if k in FIELDS and v not in (None, False, ())}
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other; give one of them.")
    for name, value in asked.items():
        if name == "json_object":
            return Constraint.json_object()
        made: Constraint = getattr(Constraint, name)(value)
        return made
    return None


def is_installed() -> bool:
    """Whether there is llguidance."""
    return importlib.util.find_spec("llguidance") is not None


def check_installed() -> None:
    """Raises UserError where there is none."""
    if not is_installed():
        raise UserError("llguidance is not installed; install qwen_jax[constrain].")


def _check_choices(texts: object) -> None:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"choice is {texts!r:.60}, but it must be a list of texts.")
    if not texts:
        raise UserError("choice is an empty list; give at least one text.")
    if "" in texts:
        raise UserError(f"choice has an empty text, number {texts.index('') + 1}; leave it out.")


def _as_json(value: Any, said: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{said} is {value!r:.60}, which is no JSON: {error}.") from error
