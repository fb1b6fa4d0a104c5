"""What an answer may look like."""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qwen_jax import strict_json
from qwen_jax.errors import UserError
from qwen_jax.text import json_schema

Kind = Literal["json_schema", "json_object", "regex", "choice", "lark"]

LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it: a model that may put white space anywhere may write nothing else."""
_ROOT = "the JSON schema"


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What all of an answer must be. Build one by its class methods.

    Attributes:
        kind: which of them.
        text: the schema, expression, grammar or choices, as JSON where they are objects.
    """

    kind: Kind
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> "Constraint":
        """JSON of a schema. Raises UserError where the schema is none, or uses what is not
        supported, which is named."""
        found = strict_json.parse_object(schema, _ROOT) if isinstance(schema, str) else schema
        if not isinstance(found, Mapping):
            raise UserError(f"{_ROOT} is {found!r:.60}, but it must be an object.")
        json_schema.check(found)
        return cls("json_schema", _as_json(dict(found), _ROOT))

    @classmethod
    def json_object(cls) -> "Constraint":
        """Any object of JSON."""
        return cls("json_object", '{"type": "object"}')

    @classmethod
    def regex(cls, expression: str) -> "Constraint":
        """What a regular expression of Rust's matches, as a whole."""
        return cls("regex", expression)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Constraint":
        """One of some texts. Raises UserError where there is none, or one is empty."""
        listed = None if isinstance(texts, str) else list(texts)
        if not listed or not all(isinstance(text, str) and text for text in listed):
            raise UserError(f"choice is {texts!r:.60}, but it must be a list of texts.")
        return cls("choice", _as_json(listed, "choice"))

    @classmethod
    def lark(cls, grammar: str) -> "Constraint":
        """What a grammar in llguidance's variant of Lark derives from `start`."""
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


def _as_json(value: Any, said: str) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{said} is {value!r:.60}, which is no JSON: {error}.") from error
