"""The score `judge`: a model reads the answers of all points, once they are there, and says how
good they are. It is loaded once, whatever number of models gave the answers.

The judge is asked by `experiment.judge.template`, filled with the fields of a prompt's line,
`{prompt}` and `{text}`, the answer. The score is the probability of its first word against both, as
of "yes" against "yes" and "no". What it was asked and what it said is in judgements.jsonl.
"""

import copy
import itertools
import json
import math
import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.experiments import kinds
from qwen_jax.experiments.scores import JUDGE
from qwen_jax.options import Options
from qwen_jax.prompts import Item
from qwen_jax.scoring import Pair

FIELDS = ("model", "quantization", "dtype", "weights", "implementation", "matmul_precision")
"""Of `experiment.judge`: which model judges; what isn't set is as in the point."""

JUDGEMENT = {"row": kinds.NATURAL, "asked": kinds.TEXT, "judge": kinds.NUMBER}

_BATCH = 256
"""Answers whose judgements are recorded together."""


class Answered(NamedTuple):
    """One answer: its prompt's first row, its own row, and what the judge is asked."""

    unit: int
    row: int
    item: Item
    asked: str


def is_asked(config: ConfigDict) -> bool:
    return JUDGE in config.experiment.scores


def check(config: ConfigDict) -> None:
    """Raises UserError where a point's judge has nothing to ask by, or is asked for nothing."""
    judge = config.experiment.judge
    given = [name for name, value in judge.items() if value and name != "words"]
    if not is_asked(config):
        if given:
            raise UserError(
                f"experiment.judge.{given[0]} does nothing without the score judge; name it in "
                "experiment.scores, or leave it out."
            )
        return
    if judge.template is None:
        raise UserError(
            "The score judge asks by experiment.judge.template, as in 'Is this a haiku? {text} "
            "Answer yes or no.'; set it."
        )
    try:
        places = {place for _, place, _, _ in string.Formatter().parse(judge.template) if place}
    except ValueError as error:
        raise UserError(f"experiment.judge.template can't be filled: {error}.") from error
    if "text" not in places:
        raise UserError("experiment.judge.template has no {text}, where the answer goes; add it.")
    if len(judge.words) != 2 or judge.words[0] == judge.words[1]:
        raise UserError(
            f"experiment.judge.words is {judge.words!r:.60}, but it must be two words, the better "
            "one first, as in ('yes', 'no')."
        )


def config_of(config: ConfigDict) -> ConfigDict:
    """Of the point that judges another one."""
    found, judge = copy.deepcopy(config), config.experiment.judge
    found.experiment.cache_dtype = None
    given = {name: judge[name] for name in FIELDS if judge[name] is not None}
    if "model" in given:  # Adapters, hashes and types are of one model.
        found.adapter, found.sha256, found.experiment.quantization = (), None, None
    if (quantization := given.pop("quantization", None)) is not None:
        found.experiment.quantization = quantization
    found.update(given)
    return found


def asked(config: ConfigDict, item: Item, text: str) -> str:
    """The judge's prompt about one answer. Raises UserError where a field is missing."""
    prompt = item.prompt if isinstance(item.prompt, str) else json.dumps(item.prompt)
    try:
        return config.experiment.judge.template.format_map(
            {**item.fields, "prompt": prompt, "text": text}
        )
    except KeyError as error:
        raise UserError(
            f"{item.where} has no {error}, which experiment.judge.template asks for."
        ) from error
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"{item.where}: experiment.judge.template can't be filled: {error}."
        ) from error


def answered(
    config: ConfigDict, items: Iterable[Item], text_of: Mapping[int, str]
) -> Iterator[Answered]:
    """All answers of a point, in the order of their rows."""
    row = 0
    for item in items:
        first = row
        for _ in range(item.samples(config.n)):
            yield Answered(first, row, item, asked(config, item, text_of[row]))
            row += 1


def judged(model: Model, words: tuple[str, str], answers: Iterable[str]) -> Iterator[float]:
    """The probability of the first word against both, for each of the judge's prompts."""
    ends = [model.tokenizer.encode(word) for word in words]

    def pairs() -> Iterator[Pair]:
        for text in answers:
            context = model.request(text, **Options()).tokens
            yield from ((context, end) for end in ends)

    scores = model.score(pairs())
    for better in scores:
        worse = next(scores)
        yes, no = (math.fsum(score.logprobs.tolist()) for score in (better, worse))
        if not (math.isfinite(yes) and math.isfinite(no)):
            raise UserError("The judge's log-probabilities are not finite.")
        yield float(1 / (1 + np.exp(np.clip(no - yes, -700, 700))))


def batches(answers: Iterable[Answered]) -> Iterator[list[Answered]]:
    left = iter(answers)
    while some := list(itertools.islice(left, _BATCH)):
        yield some


def by_unit(values: Mapping[int, tuple[Answered, float]]) -> Iterator[tuple[int, Item, float]]:
    """The mean of each prompt's samples."""
    rows = [values[row] for row in sorted(values)]
    for unit, some in itertools.groupby(rows, lambda pair: pair[0].unit):
        held = list(some)
        yield unit, held[0][0].item, math.fsum(value for _, value in held) / len(held)


def metrics_of(values: list[float]) -> dict[str, Any]:
    column = np.array(values)
    error = column.std(ddof=1) / len(column) ** 0.5 if len(column) > 1 else 0.0
    return {JUDGE: float(column.mean()), f"{JUDGE}_error": float(error)}
