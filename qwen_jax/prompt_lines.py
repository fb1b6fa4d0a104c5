"""One prompt and how it is to be answered; and the JSON that asks for it."""

import dataclasses
import json
import re
import string
from collections.abc import Mapping
from typing import Any

from qwen_jax import hints, settings
from qwen_jax.choices import check_max_tokens, check_samples, check_top_logprobs
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.options import Options, prompt_options
from qwen_jax.strict_json import written
from qwen_jax.text.constraint import FIELDS as CONSTRAINTS
from qwen_jax.text.constraint import constraint_of
from qwen_jax.text.prompt import Message, check
from qwen_jax.text.streaming import stops_of

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
    "n": (int,),
    "top_logprobs": (int,),
    **CONSTRAINTS,
} | {name: (kind,) for name, kind in SAMPLING.items()}
"""Fields of a line of JSON, and their types; others are carried into its answers."""

ANSWER = (
    *("id", "sample", "text", "finish_reason", "prompt_tokens", "tokens", "logprobs"),
    *("model", "dtype", "sampling", "error"),
)
"""Fields of an answer's line, whose names what is carried can't have."""

_OF_ITEM = ("prompt", "messages", "id")


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt: what to answer, how, where it stood and the caller's name for it.

    `own` are the settings of its line of JSON, and `fields` are all of the line, from which a
    template may have made the prompt.
    """

    prompt: str | list[Message]
    options: Options
    where: str
    id: str | int = 1
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            check(self.prompt, **prompt_options(self.options))
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from error

    @property
    def carried(self) -> dict[str, Any]:
        """The line's fields that say nothing to us, and go on into its answers."""
        return carried(self.fields)

    def samples(self, n: int) -> int:
        """How many are asked for, where the config asks for n of each prompt."""
        return self.own.get("n", n)

    def over(self, options: Options) -> "Item":
        """The item with its own settings over these. Raises UserError where one makes no sense."""
        return dataclasses.replace(self, options=_merged(options, self.own, self.where))


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A line that holds no prompt: its id, as far as there is one, why, and what is carried."""

    id: str | int
    error: str
    carried: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def carried(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a line's fields that say nothing to us."""
    return {name: value for name, value in fields.items() if name not in FIELDS}


def wrong(error: UserError, given: Mapping[str, Any], number: int) -> Wrong:
    """What is known of a line, of whose fields something is wrong."""
    name: Any = given.get("id")
    kept = {k: v for k, v in carried(given).items() if k not in ANSWER and _is_json(v)}
    return Wrong(name if type(name) in (str, int) else number, str(error), kept)


def parse(
    given: Mapping[str, Any], *, template: str | None, options: Options, where: str, number: int
) -> Item:
    """The prompt of one line of JSON.

    Args:
        given: the line's fields.
        template: makes the prompt from the line's fields, which may then have any other names.
        options: the settings of all lines, over which the line's own win.
        where: the file and the line, for messages.
        number: the line's, its id where it has none.

    Raises:
        UserError: a field makes no sense, or can't be told from one that would do something.
    """
    fields = {name: value for name, value in given.items() if value is not None}
    record = fields if template is None else _filled(template, fields, where)
    if template is None:
        fields |= {name: value for name, value in given.items() if name not in FIELDS}
        _check_carried(carried(fields), where)
    if "prompt" in record and "messages" in record:
        raise UserError(f"{where} has both 'prompt' and 'messages'; drop one of them.")
    if "prompt" not in record and "messages" not in record:
        raise UserError(
            f"{where} has neither 'prompt' nor 'messages'; give one of them, text or a chat."
        )
    for name in record.keys() & FIELDS.keys():
        _check(name, record[name], where)
    own = {k: v for k, v in record.items() if k in FIELDS and k not in _OF_ITEM}
    asked = record["prompt"] if "prompt" in record else record["messages"]
    merged = _merged(options, own, where)
    return Item(asked, merged, where, record.get("id", number), own, fields)


def _check(name: str, value: Any, where: str) -> None:
    kinds = FIELDS[name]
    if type(value) not in kinds and not (float in kinds and type(value) is int):
        words = " or ".join(settings.KINDS[kind] for kind in kinds)
        raise UserError(f"{where}: {name} is {value!r:.60}, but it must be {words}.")
    if name == "messages" and not all(isinstance(message, dict) for message in value):
        raise UserError(f"{where}: messages is {value!r:.60}, but it must be a list of objects.")
    if name == "stop_ids" and not all(type(token) is int for token in value):
        raise UserError(f"{where}: stop_ids is {value!r:.60}, but it must be a list of token ids.")


def _check_carried(fields: Mapping[str, Any], where: str) -> None:
    for name, value in fields.items():
        # What is nearly a field, or another engine's word for one, was meant to do something.
        if meant := hints.meant(name, FIELDS, 0.85):
            raise UserError(f"{where} has the field {name!r:.60}; did you mean {meant!r}?")
        if name in ANSWER:
            raise UserError(
                f"{where} has the field {name!r}, which its answer has, too; call it otherwise."
            )
        if not _is_json(value):
            raise UserError(
                f"{where}: {name!r:.60} holds a number that is not finite, which the JSON of its "
                "answer can't; write null."
            )


def _is_json(value: Any) -> bool:
    """Whether what was read leniently, or from digits beyond float's range, can be written."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _merged(options: Options, own: Mapping[str, Any], where: str) -> Options:
    apart = {*SAMPLING, *CONSTRAINTS, "n"}
    merged: Any = options | {k: v for k, v in own.items() if k not in apart}
    sampling = {name: own[name] for name in own if name in SAMPLING}
    try:
        check_samples(own.get("n", 1))
        check_max_tokens(merged.get("max_tokens", 1))
        check_top_logprobs(merged.get("top_logprobs"))
        merged["stop"] = stops_of(merged.get("stop", ()))
        if not CONSTRAINTS.keys().isdisjoint(own):
            merged["constraint"] = constraint_of(own)
        if "logit_bias" in sampling:
            sampling["logit_bias"] = bias_of(sampling["logit_bias"])
        if sampling:
            merged["sampling"] = dataclasses.replace(options["sampling"], **sampling)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return merged


def bias_of(pairs: Mapping[str, Any]) -> dict[int, float]:
    """Token ids, which are texts as keys of JSON, and their numbers."""
    bias: dict[int, float] = {}
    for token, value in pairs.items():
        number = type(value) is float or (type(value) is int and value.bit_length() < 64)
        if not (re.fullmatch("[0-9]{1,18}", token) and number):
            raise UserError(
                f"logit_bias has {written(token, 40)}: {written(value, 40)}, but it must map token "
                'ids to numbers, as in {"42": -1.5}.'
            )
        if int(token) in bias:  # as "1" and "01", which are two keys
            raise UserError(f"logit_bias names token {int(token)} twice; keep one of them.")
        bias[int(token)] = float(value)
    return bias


def _filled(template: str, record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record with a prompt made from the template, and without the fields it took, which are
    text then and no settings; the id alone may be both."""
    if "messages" in record:
        raise UserError(f"{where} has 'messages', which a template can't fill; drop one of them.")
    try:
        prompt = template.format_map(record)
    except KeyError as error:
        near = hints.meant(str(error.args[0]), record)
        way = f"did you mean {{{near}}}?" if near else f"it has {', '.join(record) or 'no fields'}."
        raise UserError(f"{where} has no {error}, which the template asks for; {way}") from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: the template {template!r} can't be filled: {error}.") from error
    places = (place for _, place, _, _ in string.Formatter().parse(template) if place)
    taken = {re.split(r"[.\[]", place)[0] for place in places} - {"id"}
    left = FIELDS.keys() - taken
    return {name: value for name, value in record.items() if name in left} | {"prompt": prompt}
