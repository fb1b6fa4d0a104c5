"""Scores of texts against what their prompt's line says is right, mostly its field `answer`."""

import importlib.util
import re
import string
from decimal import Decimal, InvalidOperation
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.experiments.scores.fields import Samples, field, share, texts
from qwen_jax.prompts import Item


def exact(item: Item, samples: Samples) -> dict[str, float]:
    """Share of samples that are the line's `answer`, letter by letter."""
    wanted = set(texts(item, "answer"))
    return {"exact": share(samples, lambda text: text in wanted)}


def match(item: Item, samples: Samples) -> dict[str, float]:
    """Share of samples that are the line's `answer`, but for letter case and outer white space."""
    wanted = {text.strip().casefold() for text in texts(item, "answer")}
    return {"match": share(samples, lambda text: text.strip().casefold() in wanted)}


def normalised(item: Item, samples: Samples) -> dict[str, float]:
    """The same but for punctuation, the articles and all white space, too, as SQuAD's evaluation
    has it (Rajpurkar et al., 2016, arXiv:1606.05250)."""
    wanted = {_normal(text) for text in texts(item, "answer")}
    return {"normalised": share(samples, lambda text: _normal(text) in wanted)}


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normal(text: str) -> str:
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def check_texts(item: Item) -> None:
    """Raises UserError where the line's `answer` is no text."""
    texts(item, "answer")


def contains(item: Item, samples: Samples) -> dict[str, float]:
    """Share of samples in which each of the line's `contains` stands, in any letter case."""
    wanted = [text.casefold() for text in texts(item, "contains")]
    return {"contains": share(samples, lambda text: all(w in text.casefold() for w in wanted))}


def check_contained(item: Item) -> None:
    """Raises UserError where the line's `contains` is no text."""
    texts(item, "contains")


def regex(item: Item, samples: Samples) -> dict[str, float]:
    """Share of samples in which the line's `regex` is found."""
    pattern = _pattern(item)
    return {"regex": share(samples, lambda text: pattern.search(text) is not None)}


def check_pattern(item: Item) -> None:
    """Raises UserError where the line's `regex` is none."""
    _pattern(item)


def _pattern(item: Item) -> re.Pattern[str]:
    value = field(item, "regex")
    try:
        return re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise UserError(
            f"{item.where}: regex is {value!r:.60}, which is no regular expression: {error}."
        ) from error


_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


def number(item: Item, samples: Samples) -> dict[str, float]:
    """Share of samples whose last number is the line's `answer`, and share that have any.

    A comma between thousands says nothing, and 0.50 is 0.5.
    """
    wanted = [_value(text) for text in texts(item, "answer")]
    found = [_last_number(sample["text"]) for sample in samples]
    return {
        "number": sum(value is not None and value in wanted for value in found) / len(found),
        "number_given": sum(value is not None for value in found) / len(found),
    }


def check_number(item: Item) -> None:
    """Raises UserError where the line's `answer` is no number."""
    for text in texts(item, "answer"):
        if _value(text) is None:
            raise UserError(
                f"{item.where}: answer is {text!r:.60}, but the score number asks for a number."
            )


def _value(text: str) -> Decimal | None:
    try:
        value = Decimal(text.strip().replace(",", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


_SAID = re.compile(r"(?:answer|choice|option)(?:\s+is)?\s*:?\s*\**[(\[]?\b([A-Z])\b", re.IGNORECASE)
_FIRST = re.compile(r"^\W*([A-Z])(?=[.,:;)\]*]|\s*(?:\n|$))")


def choice(item: Item, samples: Samples) -> dict[str, float]:
    """Share of samples that choose the line's `answer`, a letter, and share that choose any.

    The letter is the last that follows "answer", "choice" or "option", as in "The answer is (B)";
    else the one that the text begins with; else the only one that stands alone.
    """
    wanted = {text.strip().upper() for text in texts(item, "answer")}
    found = [_chosen(sample["text"]) for sample in samples]
    return {
        "choice": sum(letter in wanted for letter in found) / len(found),
        "choice_given": sum(letter is not None for letter in found) / len(found),
    }


def check_letters(item: Item) -> None:
    """Raises UserError where the line's `answer` is no letter."""
    for text in texts(item, "answer"):
        if not re.fullmatch("[A-Za-z]", text.strip()):
            raise UserError(
                f"{item.where}: answer is {text!r:.60}, but the score choice asks for a letter."
            )


def _chosen(text: str) -> str | None:
    if said := [letter for letter in _SAID.findall(text) if letter.isupper()]:
        return said[-1]
    if begins := _FIRST.match(text):
        return begins[1]
    alone = set(re.findall(r"\b([B-HJ-Z])\b", text))  # "A" and "I" are words, too.
    return alone.pop() if len(alone) == 1 else None


def edit_distance(item: Item, samples: Samples) -> dict[str, float]:
    """Letters to be put in, taken out or changed to get the line's `answer`, the nearest of
    several, as a share of the longer text: 0 is equal, 1 has nothing in common (Levenshtein, 1966).
    """
    distance = _rapidfuzz()
    wanted = texts(item, "answer")
    nearest = [
        min(distance.normalized_distance(sample["text"], one) for one in wanted)
        for sample in samples
    ]
    return {"edit_distance": sum(nearest) / len(nearest)}


def check_edit_distance(item: Item) -> None:
    """Raises UserError where the line's `answer` is no text, or the library isn't there."""
    if importlib.util.find_spec("rapidfuzz") is None:
        raise UserError(
            "The score edit_distance needs rapidfuzz; pip install 'qwen_jax[scores]' has it."
        )
    check_texts(item)


def _rapidfuzz() -> Any:
    from rapidfuzz.distance import Levenshtein

    return Levenshtein
