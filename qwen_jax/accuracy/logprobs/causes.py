"""What may lie between a model's logits and what an engine logs: the catalogue, and its fitting.

A cause is one field of `Path` away from the default: at the value that the log declares, at the
best of those in use, or at the best of all. What counts is whether its recomputation gives the
logged values; `search` decides that.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.logprobs.paths import CLIP, Align, Path, Rows, predict, rms_nats
from qwen_jax.accuracy.logprobs.reading import SETTINGS
from qwen_jax.engine.sampling import Sampling

LINES = {
    "temperature": "logits are divided by a temperature before the log-softmax",
    "top_k": "probabilities outside of top-k are zero, and the others add up to 1",
    "top_p": "probabilities outside of top-p are zero, and the others add up to 1",
    "min_p": "probabilities below min-p are zero, and the others add up to 1",
    "repetition_penalty": "the repetition penalty has changed the logits",
    "presence_penalty": "the presence penalty has changed the logits",
    "frequency_penalty": "the frequency penalty has changed the logits",
    "padded_vocabulary": "the softmax has rows of zeros beside the vocabulary's",
    "logits_bfloat16": "logits are rounded to bfloat16 before the log-softmax",
    "logits_float16": "logits are rounded to float16 before the log-softmax",
    "log_softmax_bfloat16": "every step of the log-softmax is rounded to bfloat16",
    "log_softmax_float16": "every step of the log-softmax is rounded to float16",
    "logprobs_bfloat16": "log-probabilities are rounded to bfloat16",
    "logprobs_float16": "log-probabilities are rounded to float16",
    "written_early": "each token has the log-probability of the token after it",
    "written_late": "each token has the log-probability of the token before it",
    "labels_not_shifted": "each token is looked up in the logits after it, not before it",
    "token_before": "the text began with a token more than the log has",
    "prompt_dropped": "the prompt was not there",
}
"""Every cause by its name."""

ROUGH, FINE = 8, 32
"""Turns of a fit: to tell causes apart, and to name a number."""

MILDEST_TOP_P = 0.95
"""Of filters in common use the one that moves log-probabilities least: by its logarithm at most."""

CLOSEST = 4
"""Of the causes beside a given one, those that are looked at on all rows."""


_COMMON: dict[str, tuple[Any, ...]] = {
    "top_k": (1, 2, 5, 8, 10, 16, 20, 30, 32, 40, 50, 64, 100, 128, 200, 256, 1000),
    "top_p": (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999),
    "min_p": (0.01, 0.02, 0.05, 0.1, 0.2),
}
"""Values in use of what has no gradient."""

_MILD: dict[str, float | int] = {
    "temperature": 0.9,
    "top_k": 50,  # the default of transformers
    "top_p": MILDEST_TOP_P,
    "min_p": 0.05,  # the default of llama.cpp
    "repetition_penalty": 1.05,  # of Qwen2.5's generation_config.json
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "padded_vocabulary": 64,  # engines pad to multiples of it
}
"""Mild values of what has a number."""

_RANGES = {
    "temperature": (0.05, 20.0),
    "repetition_penalty": (0.5, 3.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "padding": (0.0, 4096.0),
}
_FITTED = {"padded_vocabulary": "padding"} | {n: n for n in _RANGES if n != "padding"}
_FIXED = {
    f"{field}_{dtype}": {name: dtype}
    for field, name in (("logits", "logits"), ("log_softmax", "softmax"), ("logprobs", "logprobs"))
    for dtype in ("bfloat16", "float16")
} | {
    "written_early": {"align": Align(1, 0)},
    "written_late": {"align": Align(1, 2)},
    "labels_not_shifted": {"align": Align(0, 0)},
}
_NEUTRAL = {field.name: field.default for field in dataclasses.fields(Path)}


@dataclasses.dataclass(frozen=True)
class Change:
    """A cause with its value: that of each line's own declaration where `value` is None."""

    name: str
    field: str
    value: Any = None

    def on(self, sampling: Sampling) -> dict[str, Any]:
        value = getattr(sampling, self.field) if self.value is None else self.value
        if self.field == "temperature" and value == 0:  # greedy: nothing is divided
            value = 1.0
        return {self.field: value}

    @property
    def said(self) -> str:
        if self.value is None:
            return f"{self.name}, as declared"
        if isinstance(self.value, int | float):
            return f"{self.name} {self.value:g}"
        return self.name


Changes = tuple[Change, ...]


def path(changes: Changes, sampling: Sampling) -> Path:
    fields: dict[str, Any] = {}
    for change in changes:
        fields |= change.on(sampling)
    return dataclasses.replace(Path(), **fields)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Positions that causes are fitted on.

    Attributes:
        rows: of each text some.
        sampling: what each text's line declares.
        digits: half a step of the decimals that the log keeps.
    """

    rows: Sequence[Rows]
    sampling: Sequence[Sampling]
    digits: float

    def part(self) -> "Sample":
        """A quarter of the positions."""
        rows = [rows.take(slice(None, None, 4)) for rows in self.rows]
        return dataclasses.replace(self, rows=rows)

    def score(self, changes: Changes) -> float:
        """RMS error in nats; worse than any where nothing can be compared."""
        errors = [
            predict(path(changes, declared), rows, self.digits, edges=False).error
            for rows, declared in zip(self.rows, self.sampling, strict=True)
        ]
        joined = np.concatenate(errors)
        return rms_nats(joined) if joined.size else CLIP


def declared(sampling: Sequence[Sampling]) -> list[Change]:
    """Settings that some line declares to be in force."""
    return [
        Change(name, name)
        for name in SETTINGS
        if any(Change(name, name).on(s)[name] != _NEUTRAL[name] for s in sampling)
    ]


def mild(sampling: Sequence[Sampling]) -> list[Changes]:
    """Every cause by itself, at what lines declare or else at the mildest number in common use."""
    own = {change.name: change for change in declared(sampling)}
    fixed = [Change(name, *field) for name, fields in _FIXED.items() for field in fields.items()]
    numbers = [Change(name, _FITTED.get(name, name), value) for name, value in _MILD.items()]
    return [(own.get(change.name, change),) for change in (*numbers, *fixed)]


def singles(sample: Sample) -> Iterator[Changes]:
    """Every cause by itself, at its best value."""
    for changes in _with_one_more((), sample.part()):
        yield _refitted(sample, changes)


def pairs(sample: Sample, given: Changes, progress: Progress) -> list[Changes]:
    """These changes with one more: the few of all causes that come closest, at their best values.

    All are fitted on a part first, since each takes some hundred predictions.

    Args:
        progress: hears of causes tried and in all.
    """
    few = sample.part()
    rough = []
    for changes in _with_one_more(given, few):
        fitted = _refitted(few, changes, turns=ROUGH)
        # Beside a rounding the error goes in steps, and a fit ends near the right one.
        rough.append(min(dict.fromkeys(shorter(fitted)), key=few.score))
        progress(len(rough), len(LINES))
    return [_refitted(sample, changes) for changes in sorted(rough, key=few.score)[:CLOSEST]]


def _with_one_more(given: Changes, few: Sample) -> Iterator[Changes]:
    """These changes with each cause of the catalogue, its number yet to be fitted."""
    taken = {change.field for change in given}
    for name, fields in _FIXED.items():
        ((field, value),) = fields.items()
        if field not in taken:
            yield (*given, Change(name, field, value))
    for name, values in _COMMON.items():
        if name not in taken:
            options = [(*given, Change(name, name, value)) for value in values]
            # What is fitted already is another number beside each of them.
            yield min((_refitted(few, option, turns=ROUGH) for option in options), key=few.score)
    for name, field in _FITTED.items():
        if field not in taken:
            yield (*given, Change(name, field, _NEUTRAL[field]))


def subsets(changes: Sequence[Change]) -> Iterator[Changes]:
    """All of them but the empty one, small ones first."""
    for size in range(1, len(changes) + 1):
        yield from itertools.combinations(changes, size)


def rounds(changes: Changes) -> bool:
    """Whether a dtype is among them: what is rounded is known only to a step of it where logits
    are known to no more than that."""
    return any(change.name.endswith("float16") for change in changes)


def _refitted(sample: Sample, changes: Changes, turns: int = FINE) -> Changes:
    """With every number that has a range at its best, one after another, the last one first."""
    places = [i for i, c in enumerate(changes) if c.field in _RANGES and c.value is not None]
    for turn in range(1 if len(places) < 2 else 3):
        before = changes
        for place in reversed(places):
            near = turn > 0 or place < len(changes) - 1
            changes = _fitted(sample, changes, place, turns, near=near)
        if turn and _close(before, changes):
            break
    return changes


def _close(some: Changes, others: Changes) -> bool:
    """Whether no number has moved by more than a millionth."""
    pairs = [(a.value, b.value) for a, b in zip(some, others, strict=True) if a.field in _RANGES]
    return all(a == b or math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pairs)


def _fitted(sample: Sample, changes: Changes, place: int, turns: int, near: bool) -> Changes:
    """With one number at its best, sought in the whole of its range or near where it is."""
    change = changes[place]
    low, high = _RANGES[change.field]

    def with_value(value: float) -> Changes:
        made = dataclasses.replace(change, value=value)
        return (*changes[:place], made, *changes[place + 1 :])

    def square(value: float) -> float:
        """Smooth where it is least, and so found by a few parabolas."""
        return sample.score(with_value(value)) ** 2

    grid = np.geomspace(low, high, 13) if low > 0 else np.linspace(low, high, 13)
    if change.field == "padding":
        grid = np.concatenate([[0], np.geomspace(1, high, 12)])
    if near:
        about = float(change.value)
        grid = about * np.geomspace(0.6, 1.7, 5) if low > 0 else about + np.linspace(-0.5, 0.5, 5)
        if change.field == "padding":
            grid = np.maximum(about * np.geomspace(0.5, 2, 5), 0)
    at = int(np.argmin([square(float(v)) for v in grid]))
    ends = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, len(grid) - 1)])
    options = {"maxiter": turns, "xatol": 1e-8 * max(abs(ends[0]), abs(ends[1]), 1e-3)}
    best = float(minimize_scalar(square, bounds=ends, method="bounded", options=options).x)
    return with_value(round(best) if change.field == "padding" else best)


def shorter(changes: Changes) -> Iterator[Changes]:
    """With fitted values as people write them, the fewest digits first, and at last as they are."""
    for digits in (2, 3, 4, 6):
        yield tuple(
            dataclasses.replace(change, value=float(f"{change.value:.{digits}g}"))
            if isinstance(change.value, float) and change.field in _RANGES
            else change
            for change in changes
        )
    yield changes
