"""One prompt and how it is to be answered; and the line of JSON that asks for it."""

import dataclasses
import difflib
import json
import re
import string
from collections.abc import Mapping
from typing import Any

from qwen_jax import settings
from qwen_jax.api import Message, Options
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.strict_json import parse_object
from qwen_jax.text.streaming import StopStrings

SAMPLING: dict[str, type] = {
    field.name: dict if field.name == "logit_bias" else field.type  # type: ignore[misc]
    for field in dataclasses.fields(Sampling)
}
"""Fields of a line of JSON that are `Sampling`'s."""

FIELDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "messages": (list,),
    "id": (str, int),
    "system": (str,),
    "raw": (bool,),
    "suffix": (str,),
    "tools": (list,),
    "continue_final_message": (bool,),
    "max_tokens": (int,),
    "stop": (str, list),
    "stop_ids": (list,),
} | {name: (kind,) for name, kind in SAMPLING.items()}
"""Fields of a line of JSON, and their types."""

_OF_ITEM = ("prompt", "messages", "id")


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt: what to answer, how, where it stood and the caller's name for it.

    `own` are the settings of its line of JSON, and `fields` the line that a template made the
    prompt from.
    """

    prompt: str | list[Message]
    options: Options
    where: str
    id: str | int = 1
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompt == "" and self.options.get("suffix") is None:
            raise UserError(f"{self.where}: the prompt is empty; ask something.")

    def over(self, options: Options) -> "Item":
        """The item with its own settings over these. Raises UserError where one makes no sense."""
        return dataclasses.replace(self, options=_merged(options, self.own, self.where))


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A line that holds no prompt: its id, as far as there is one, and why."""

    id: str | int
    error: str


def id_of(line: str, number: int) -> str | int:
    """The id of a line of JSON that something is wrong with, or its number."""
    try:
        found = json.loads(line).get("id")
    except (ValueError, AttributeError, RecursionError):
        found = None
    return found if type(found) in (str, int) else number


def parse(line: str, *, template: str | None, options: Options, where: str, number: int) -> Item:
    """The prompt of one line of JSON.

    Args:
        template: makes the prompt from the line's fields, which may then have any other names.
        options: the settings of all lines, over which the line's own win.
        where: the file and the line, for messages.
        number: the line's, its id where it has none.

    Raises:
        UserError: the line is no object, or has a field that is unknown or makes no sense.
    """
    # An id may hold half a character, as JavaScript writes some; a prompt that does is refused
    # by the tokenizer.
    given = parse_object(line, where, allow_nan=True, allow_halves=True)
    fields = {name: value for name, value in given.items() if value is not None}
    record = fields if template is None else _filled(template, fields, where)
    if ("prompt" in record) == ("messages" in record):
        raise UserError(f"{where} must have either 'prompt' or 'messages'.")
    for name, value in record.items():
        _check(name, value, where)
    own = {name: value for name, value in record.items() if name not in _OF_ITEM}
    asked = record["prompt"] if "prompt" in record else record["messages"]
    merged = _merged(options, own, where)
    return Item(asked, merged, where, record.get("id", number), own, fields)


def _check(name: str, value: Any, where: str) -> None:
    kinds = FIELDS.get(name)
    if kinds is None:
        near = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(FIELDS)}."
        raise UserError(f"{where} has the field {name!r}; {hint}")
    if type(value) not in kinds and not (float in kinds and type(value) is int):
        words = " or ".join(settings.KINDS[kind] for kind in kinds)
        raise UserError(f"{where}: {name} is {value!r:.60}, but it must be {words}.")
    if name == "max_tokens" and value < 1:
        raise UserError(f"{where}: max_tokens is {value}, but it must be positive.")
    if name == "stop_ids" and not all(type(token) is int for token in value):
        raise UserError(f"{where}: stop_ids is {value!r:.60}, but it must be a list of token ids.")


def _merged(options: Options, own: Mapping[str, Any], where: str) -> Options:
    merged: Any = options | {name: own[name] for name in own if name not in SAMPLING}
    sampling = {name: own[name] for name in own if name in SAMPLING}
    try:
        if "stop" in own:
            merged["stop"] = [own["stop"]] if isinstance(own["stop"], str) else own["stop"]
            StopStrings(merged["stop"])  # Refuses an empty one.
        if "logit_bias" in sampling:
            sampling["logit_bias"] = _bias(sampling["logit_bias"])
        if sampling:
            merged["sampling"] = dataclasses.replace(options["sampling"], **sampling)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return merged


def _bias(pairs: Mapping[str, Any]) -> dict[int, float]:
    """Token ids, which are texts as keys of JSON, and their numbers."""
    for token, value in pairs.items():
        if not (token.isascii() and token.isdecimal()) or type(value) not in (int, float):
            raise UserError(
                f"logit_bias has {token!r:.40}: {value!r:.40}, but it must map token ids to "
                'numbers, as in {"42": -1.5}.'
            )
    return {int(token): float(value) for token, value in pairs.items()}


def _filled(template: str, record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record with a prompt made from the template, and without the fields it took, which are
    text then and no settings; the id alone may be both."""
    if "messages" in record:
        raise UserError(f"{where} has 'messages', which a template can't fill; drop one of them.")
    try:
        prompt = template.format_map(record)
    except KeyError as error:
        raise UserError(f"{where} has no {error}, which the template asks for.") from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: the template {template!r} can't be filled: {error}.") from error
    places = (place for _, place, _, _ in string.Formatter().parse(template) if place)
    taken = {re.split(r"[.\[]", place)[0] for place in places} - {"id"}
    left = FIELDS.keys() - taken
    return {name: value for name, value in record.items() if name in left} | {"prompt": prompt}
