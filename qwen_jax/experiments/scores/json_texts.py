"""Scores of texts that are to be JSON."""

import functools
import importlib.util
import json
import re
from typing import Any

from qwen_jax import strict_json
from qwen_jax.errors import UserError
from qwen_jax.experiments.scores.fields import Samples, field, share
from qwen_jax.prompts import Item

_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n\s*```\s*", re.DOTALL)


def valid(item: Item, samples: Samples) -> dict[str, float]:
    """Share of samples that are JSON, bare or as a whole in a fenced block of Markdown."""
    return {"json": share(samples, lambda text: _parsed(text) is not _NONE)}


def of_schema(item: Item, samples: Samples) -> dict[str, float]:
    """Share of samples that are JSON, and the same of the line's `schema` (JSON Schema)."""
    validator = _validator(json.dumps(field(item, "schema")), item.where)
    values = [_parsed(sample["text"]) for sample in samples]
    return {
        "json": sum(value is not _NONE for value in values) / len(values),
        "json_schema": sum(v is not _NONE and validator.is_valid(v) for v in values) / len(values),
    }


def check_schema(item: Item) -> None:
    """Raises UserError where the line's `schema` is none, or the library isn't there."""
    if importlib.util.find_spec("jsonschema") is None:
        raise UserError(
            "The score json_schema needs jsonschema; pip install 'qwen_jax[scores]' has it."
        )
    _validator(json.dumps(field(item, "schema")), item.where)


_NONE = object()
"""What is no JSON; null is."""


def _parsed(text: str) -> Any:
    fenced = _FENCED.fullmatch(text)
    try:
        return strict_json.parse(fenced[1] if fenced else text, "an answer")
    except UserError:
        return _NONE


@functools.lru_cache(maxsize=256)
def _validator(schema: str, where: str) -> Any:
    import jsonschema

    held = json.loads(schema)
    kind = jsonschema.validators.validator_for(held, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(held)
    except jsonschema.SchemaError as error:
        raise UserError(f"{where}: schema is no JSON Schema: {error.message}.") from error
    return kind(held)
