"""What answers are judged by: functions of a prompt and its samples, by name.

A score of your own is a function in any module that Python finds, named `module:function`:

    def score(item: Item, samples: Sequence[dict]) -> dict[str, float]

A sample has `text`, `finish_reason` and `tokens`; `item.fields` are those of the prompt's line.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.experiments.scores import answers, json_texts, texts
from qwen_jax.experiments.scores.fields import Score
from qwen_jax.experiments.task import imported
from qwen_jax.prompts import Item

SCORES: dict[str, Score] = {
    "choice": answers.choice,
    "contains": answers.contains,
    "diversity": texts.diversity,
    "edit_distance": answers.edit_distance,
    "exact": answers.exact,
    "haiku": texts.haiku,
    "json": json_texts.valid,
    "json_schema": json_texts.of_schema,
    "length": texts.length,
    "match": answers.match,
    "normalised": answers.normalised,
    "number": answers.number,
    "regex": answers.regex,
    "repetition": texts.repetition,
}

JUDGE = "judge"
"""The name of the one score that a model gives, when all answers are there (see `judging`)."""

_CHECKS = {
    "choice": answers.check_letters,
    "contains": answers.check_contained,
    "edit_distance": answers.check_edit_distance,
    "exact": answers.check_texts,
    "haiku": texts.check_word,
    "json_schema": json_texts.check_schema,
    "match": answers.check_texts,
    "normalised": answers.check_texts,
    "number": answers.check_number,
    "regex": answers.check_pattern,
}
"""What a score asks of a prompt's line; each raises UserError where it isn't there."""


def check_fields(names: Iterable[str], item: Item) -> None:
    """Raises UserError where a score of these names asks for what the item lacks."""
    for name in names:
        if name in _CHECKS:
            _CHECKS[name](item)


def judged(
    scores: Iterable[Score], item: Item, samples: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """What all of them say of a prompt's samples. Raises UserError for what is no finite number."""
    found: dict[str, float] = {}
    for score in scores:
        for name, value in score(item, samples).items():
            if not math.isfinite(value):
                raise UserError(f"{item.where}: the score {name} is {value}, not finite.")
            found[name] = float(value)
    return found


def score(name: str) -> Score:
    """A score by its name here, or by `module:function`. Raises UserError for an unknown one."""
    found = SCORES.get(name) or imported(name, "experiment.scores", {**SCORES, JUDGE: None})
    if not callable(found):
        raise UserError(f"experiment.scores names {name!r}, but that is no function.")
    return found
