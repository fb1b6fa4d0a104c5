"""What answers are judged by: functions of a prompt and its samples, by name.

A score of your own is a function in any module that Python finds, named `module:function`:

    def score(item: Item, samples: Sequence[dict]) -> dict[str, float]

A sample has `text`, `finish_reason` and `tokens`; `item.fields` are those of the prompt's line.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from qwen_jax.errors import UserError
from qwen_jax.experiments.scores import answers, json_texts, texts
from qwen_jax.experiments.scores.fields import Score
from qwen_jax.experiments.task import imported
from qwen_jax.prompts import Item


class Known(NamedTuple):
    """A score of this program.

    Attributes:
        score: the function.
        metrics: names of what it returns.
        check: raises UserError where a prompt's line lacks what it asks for.
    """

    score: Score
    metrics: tuple[str, ...]
    check: Callable[[Item], None] | None = None


SCORES = {
    "choice": Known(answers.choice, ("choice", "choice_given"), answers.check_letters),
    "contains": Known(answers.contains, ("contains",), answers.check_contained),
    "diversity": Known(texts.diversity, ("different_texts", "distinct_1", "distinct_2")),
    "edit_distance": Known(answers.edit_distance, ("edit_distance",), answers.check_edit_distance),
    "exact": Known(answers.exact, ("exact",), answers.check_texts),
    "haiku": Known(texts.haiku, ("haiku", "has_word", "three_lines"), texts.check_word),
    "json": Known(json_texts.valid, ("json",)),
    "json_schema": Known(json_texts.of_schema, ("json", "json_schema"), json_texts.check_schema),
    "length": Known(texts.length, ("letters", "words", "lines", "tokens")),
    "match": Known(answers.match, ("match",), answers.check_texts),
    "normalised": Known(answers.normalised, ("normalised",), answers.check_texts),
    "number": Known(answers.number, ("number", "number_given"), answers.check_number),
    "regex": Known(answers.regex, ("regex",), answers.check_pattern),
    "repetition": Known(texts.repetition, ("repetition", "stuck")),
}

JUDGE = "judge"
"""The name of the one score that a model gives, when all answers are there (see `judging`), and
that of its metric."""


def metrics_of(names: Iterable[str]) -> list[str] | None:
    """What scores of these names return; None where one is of somebody's own."""
    found: list[str] = []
    for name in names:
        if name == JUDGE:
            found.append(JUDGE)
        elif name in SCORES:
            found += SCORES[name].metrics
        else:
            return None
    return found


def check_fields(names: Iterable[str], item: Item) -> None:
    """Raises UserError where a score of these names asks for what the item lacks."""
    for name in names:
        if name in SCORES and (check := SCORES[name].check) is not None:
            check(item)


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
    if name in SCORES:
        return SCORES[name].score
    found = imported(name, "experiment.scores", {**SCORES, JUDGE: None})
    if not callable(found):
        raise UserError(f"experiment.scores names {name!r}, but that is no function.")
    return found
