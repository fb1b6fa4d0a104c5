"""Scores of texts by themselves."""

import re

from qwen_jax.experiments.scores.fields import Samples, field
from qwen_jax.prompts import Item


def diversity(item: Item, samples: Samples) -> dict[str, float]:
    """Of the samples of one prompt, from 0 to 1.

    distinct_n: different runs of n words among all of them (Li et al., 2016, arXiv:1510.03055);
    different_texts: texts unlike the others.
    """
    found = {"different_texts": len({s["text"] for s in samples}) / len(samples)}
    words = [sample["text"].lower().split() for sample in samples]
    for n in (1, 2):
        runs = [run for text in words for run in _runs(text, n)]
        found[f"distinct_{n}"] = len(set(runs)) / max(len(runs), 1)
    return found


def repetition(item: Item, samples: Samples) -> dict[str, float]:
    """Of each sample by itself, the share of runs of four words that were there before (Welleck et
    al., 2020, arXiv:1908.04319); and the share of samples that end in the same line three times,
    which seldom end by themselves."""
    repeated, stuck = 0.0, 0
    for sample in samples:
        runs = _runs(sample["text"].lower().split(), 4)
        repeated += 1 - len(set(runs)) / len(runs) if runs else 0.0
        lines = [line.strip() for line in sample["text"].splitlines() if line.strip()]
        stuck += len(lines) > 2 and len(set(lines[-3:])) == 1
    return {"repetition": repeated / len(samples), "stuck": stuck / len(samples)}


def length(item: Item, samples: Samples) -> dict[str, float]:
    """Means over the samples, of letters, words, lines with something in them, and tokens."""
    count = len(samples)
    texts = [sample["text"] for sample in samples]
    return {
        "letters": sum(map(len, texts)) / count,
        "words": sum(len(text.split()) for text in texts) / count,
        "lines": sum(bool(line.strip()) for text in texts for line in text.splitlines()) / count,
        "tokens": sum(len(sample["tokens"]) for sample in samples) / count,
    }


def haiku(item: Item, samples: Samples) -> dict[str, float]:
    """Shares of samples that hold the line's `word` in three lines and end by themselves, that hold
    it, and that have three lines.

    The word has to stand as a whole word, in any letter case.
    """
    word = re.escape(str(field(item, "word")))
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
        "haiku": sum(map(all, verdicts)) / len(samples),
        "has_word": counts[0] / len(samples),
        "three_lines": counts[1] / len(samples),
    }


def check_word(item: Item) -> None:
    """Raises UserError where the line has no `word`."""
    field(item, "word")


def _runs(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
