"""What answers are judged by: functions of a prompt and its samples, by name.

A score of your own is a function in any module that Python finds, named `module:function`:

    def score(item: Item, samples: Sequence[dict]) -> dict[str, float]

A sample has `text`, `finish_reason` and `tokens`; `item.fields` are those of the prompt's line.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.experiments.task import imported
from qwen_jax.prompts import Item

Score = Callable[[Item, Sequence[dict[str, Any]]], dict[str, float]]


def diversity(item: Item, samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of the samples of one prompt, from 0 to 1.

    distinct_n: different runs of n words among all of them (Li et al., 2016, arXiv:1510.03055);
    different_texts: texts unlike the others.
    """
    found = {"different_texts": len({s["text"] for s in samples}) / len(samples)}
    words = [sample["text"].lower().split() for sample in samples]
    for n in (1, 2):
        runs = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
        found[f"distinct_{n}"] = len(set(runs)) / max(len(runs), 1)
    return found


def haiku(item: Item, samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of samples that hold the line's `word`, that have three lines, and that have both and
    end by themselves.

    The word has to stand as a whole word, in any letter case.
    """
    word = re.escape(str(_field(item, "word")))
    verdicts = [
        (
            re.search(rf"(?<!\w){word}(?!\w)", sample["text"], re.IGNORECASE) is not None,
            sum(bool(line.strip()) for line in sample["text"].splitlines()) == 3,
            sample["finish_reason"] == "stop",
        )
        for sample in samples
    ]
    counts = [sum(column) for column in zip(*verdicts, strict=True)]
    return {
        "has_word": counts[0] / len(samples),
        "three_lines": counts[1] / len(samples),
        "haiku": sum(map(all, verdicts)) / len(samples),
    }


def match(item: Item, samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of samples that are the line's `answer`, but for letter case and outer white space."""
    wanted = str(_field(item, "answer")).strip().casefold()
    return {"match": sum(s["text"].strip().casefold() == wanted for s in samples) / len(samples)}


def _field(item: Item, name: str) -> Any:
    if name not in item.fields:
        raise UserError(f"{item.where} has no field {name!r}, which the score asks for; add it.")
    return item.fields[name]


SCORES: dict[str, Score] = {"diversity": diversity, "haiku": haiku, "match": match}
_ASKED = {"haiku": "word", "match": "answer"}
"""The field of a prompt's line that a score asks for."""


def check_fields(names: Iterable[str], item: Item) -> None:
    """Raises UserError where a score of these names asks for a field that the item lacks."""
    for name in names:
        if name in _ASKED:
            _field(item, _ASKED[name])


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
    found = SCORES.get(name) or imported(name, "experiment.scores", SCORES)
    if not callable(found):
        raise UserError(f"experiment.scores names {name!r}, but that is no function.")
    return found
