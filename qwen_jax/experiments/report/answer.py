"""The answer as a sentence, as a table, and as fields of a line and of JSON."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_jax.experiments.answers.answer import Answer, Entry
from qwen_jax.experiments.answers.settings import UNPAIRED, Setting
from qwen_jax.experiments.answers.statistics import LEVEL
from qwen_jax.experiments.declaration import clipped, short
from qwen_jax.experiments.report.tables import number, shown
from qwen_jax.reporting.table import Rounded, Table
from qwen_jax.settings import program

NONE = (
    "No answer: there are no two settings with a score; experiment.scores names some, and --metric "
    "any other metric."
)
_NAMED = 4
"""Settings that a sentence names."""

FIELDS = ("rank", "mean", "error", "units", "difference", "low", "high", "p", "verdict")
"""Of a point's setting, in results.csv, where each stands after `answer.`."""


def sentence(answer: Answer | None) -> str:
    """What came out, in words."""
    if answer is None:
        return NONE
    several = len({entry.setting.run for entry in answer.entries}) > 1
    base = name(answer.baseline, several)
    found: dict[str, list[str]] = {}
    for entry in answer.entries:
        found.setdefault(entry.verdict, []).append(name(entry.setting, several))
    others = len(answer.entries) - 1
    parts = []
    for verdict, words in (
        ("better", "better"),
        ("worse", "worse"),
        ("not told apart", "not told apart from it"),
        ("not tested", "not tested, for want of more than one value"),
    ):
        if some := found.get(verdict):
            parts.append(f"{_count(some, others)} {words}{_list(some)}")
    first = answer.entries[0]
    mean = number(first.mean, first.error)
    if len({entry.mean for entry in answer.entries}) == 1:
        every = "both" if others == 1 else f"all {others + 1}"
        return f"On {answer.metric} {every} settings have the same mean, {mean}."
    said = f"On {answer.metric} {base} has the best mean, {mean}."
    if answer.given:
        which = "is first" if answer.baseline is first.setting else "is the baseline"
        said = f"On {answer.metric} {base} {which}; the best mean is {mean}."
    left = f" {answer.left_out} without a value." if answer.left_out else ""
    return f"{said} Of the others: {'; '.join(parts)}.{left}"


def _count(some: Sequence[str], others: int) -> str:
    if len(some) == others > 1:
        return "both" if others == 2 else f"all {others}"
    return f"{len(some)}"


def _list(some: Sequence[str]) -> str:
    more = f", and {len(some) - _NAMED} more" if len(some) > _NAMED else ""
    return f" ({', '.join(some[:_NAMED])}{more})"


def name(setting: Setting, several_runs: bool) -> str:
    """A setting in a sentence."""
    held = {f: v for f, v in setting.overrides.items() if v is not None or not several_runs}
    label = " ".join(f"{short(f)}={clipped(shown(v))}" for f, v in held.items())
    if several_runs:
        return f"{setting.run} {label}".rstrip()
    return label or setting.label


def explained(answer: Answer) -> str:
    """How it came about, below the table."""
    way = "lower" if answer.lower else "higher"
    what = "the named baseline" if answer.given else "the best mean, which was found by looking"
    sure = f"{1 - LEVEL:.0%}"
    pairs = "1 comparison" if answer.comparisons == 1 else f"{answer.comparisons:,} comparisons"
    pairing = f", paired by {answer.of}"
    if answer.of == UNPAIRED:
        pairing = " without pairs, since repeats have none"
    elif answer.of != "seed" and any(entry.seeds > 1 for entry in answer.entries):
        pairing += ", over seeds"
    more = ""
    if answer.of == "seed" and f"{answer.metric}_error" in answer.baseline.points[0].metrics:
        more = (
            f" What each prompt scored is not recorded; {program()} score makes up for it where "
            "there are answers."
        )
    alone = [entry for entry in answer.entries if entry.seeds == 1]
    own = [e.setting.points[0].metrics.get(answer.metric, e.mean) for e in alone]
    if not np.allclose(own, [entry.mean for entry in alone], rtol=1e-6):
        more += " These are means; what the task says of each point, such as a median, is below."
    return (
        f"Ranked by {answer.metric}, {way} is better. Differences are to {what}{pairing}; "
        f"p and the intervals hold for all together with {sure}, by Holm's correction for "
        f"{pairs}.{more}"
    )


def table(answer: Answer, *, runs: bool) -> Table:
    """A line a setting, from the best to the worst."""
    swept = list(answer.entries[0].setting.overrides)
    header = [
        *("#", *(["run"] if runs else []), *map(short, swept)),
        *(answer.metric, "n", "difference", "interval", "p", "verdict"),
    ]
    lines = []
    for rank, entry in enumerate(answer.entries, start=1):
        own = [clipped(shown(entry.setting.overrides[field])) for field in swept]
        lines.append(
            [
                *(str(rank), *([entry.setting.run] if runs else []), *own),
                Rounded.of(number(entry.mean, entry.error), _full(entry.mean, entry.error)),
                _counted(answer, entry),
                _signed(entry),
                _interval(entry),
                "" if entry.p is None else probability(entry.p),
                entry.text,
            ]
        )
    return Table(header, lines, range(len(header) - 1))


def _full(value: float, error: float | None) -> str:
    return f"{value!r}" if error is None else f"{value!r} ± {error!r}"


def _counted(answer: Answer, entry: Entry) -> str:
    if answer.of == "seed" or entry.seeds == 1:
        return f"{entry.units:,}"
    return f"{entry.units:,} x {entry.seeds}"


def _places(entry: Entry) -> int | None:
    """Digits after the point that a difference is worth: two of half its interval, and one more
    where a limit would look like 0 that isn't."""
    if entry.low is None or entry.high is None or entry.high <= entry.low:
        return None
    leading = f"{(entry.high - entry.low) / 2:.0e}"
    places = 1 - int(leading.partition("e")[2])
    hidden = any(limit and round(limit, places) == 0 for limit in (entry.low, entry.high))
    return places + hidden


def _rounded(value: float, places: int | None) -> str:
    if places is None or places > 5:
        return f"{value:+.3g}"
    return f"{value:+,.{max(places, 0)}f}"


def _signed(entry: Entry) -> str:
    if entry.difference is None:
        return ""
    return Rounded.of(_rounded(entry.difference, _places(entry)), repr(entry.difference))


def _interval(entry: Entry) -> str:
    if entry.low is None or entry.high is None:
        return ""
    places = _places(entry)
    return f"{_rounded(entry.low, places)} to {_rounded(entry.high, places)}"


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def of_point(answer: Answer | None, point: str) -> list[Any]:
    """FIELDS of the setting that a point belongs to."""
    found = answer and answer.of_point(point)
    if not found:
        return [None] * len(FIELDS)
    rank, entry = found
    return [rank, *(getattr(entry, field) for field in FIELDS[1:])]


def as_json(answer: Answer | None) -> dict[str, Any] | None:
    """All of it."""
    if answer is None:
        return None
    return {
        "sentence": sentence(answer),
        "metric": answer.metric,
        "better": "lower" if answer.lower else "higher",
        "baseline": {"run": answer.baseline.run, **answer.baseline.overrides},
        "baseline_given": answer.given,
        "unit": answer.of,
        "level": LEVEL,
        "comparisons": answer.comparisons,
        "settings": [
            {
                "run": entry.setting.run,
                "overrides": dict(entry.setting.overrides),
                "points": [point.id for point in entry.setting.points],
                "seeds": entry.seeds,
                **dict(zip(FIELDS, of_point(answer, entry.setting.points[0].id), strict=True)),
                "test": entry.test,
                "text": entry.text,
            }
            for entry in answer.entries
        ],
    }
