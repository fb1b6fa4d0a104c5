"""Which setting is better, by how much, and whether it may be luck: settings ranked on one metric,
each compared with a baseline or with the best of them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_jax.experiments.answers import chosen, statistics
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.experiments.answers.settings import DRAWN_ANEW, SEED, UNPAIRED, Setting, named
from qwen_jax.experiments.answers.statistics import Difference, Mean

_MANY_TIMES = 20
"""Of the units there are: who would have to take more of them is told that nothing was seen."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One setting.

    Attributes:
        mean, error: of the metric, and its standard error, if that is known.
        units: how many of them, each with a value for every one of so many `seeds`.
        difference: its mean less the baseline's; None of the baseline itself.
        low, high: where that lies, at the level at which it is tested.
        p: corrected for the number of comparisons.
        test: what gave it.
        verdict: "baseline", "better", "worse", "not told apart", or "not tested".
        text: the verdict, and what it would take.
    """

    setting: Setting
    mean: float
    error: float | None
    units: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    test: str = ""
    verdict: str = "baseline"
    text: str = "baseline"

    @property
    def seeds(self) -> int:
        return self.setting.seeds


@dataclasses.dataclass(frozen=True)
class Answer:
    """Settings from the best to the worst.

    Attributes:
        lower: whether less of the metric is better.
        given: whether somebody named the baseline, or it is the best one, picked by looking.
        of: what the units are, "seed" where each seed has one value of all of them.
        comparisons: how many are corrected for.
        left_out: how many settings have no value of the metric.
    """

    metric: str
    lower: bool
    baseline: Setting
    given: bool
    of: str
    comparisons: int
    entries: tuple[Entry, ...]
    left_out: int

    def of_point(self, point: str) -> tuple[int, Entry] | None:
        """The rank, from 1, and the entry of the setting that a point belongs to."""
        for rank, entry in enumerate(self.entries, start=1):
            if any(point == other.id for other in entry.setting.points):
                return rank, entry
        return None


@dataclasses.dataclass(frozen=True)
class Value:
    """What a setting has of the metric.

    Attributes:
        of: the kind of unit that has values, "seed" where there are none but one a seed.
    """

    setting: Setting
    mean: Mean
    of: str
    units: int


def answer(
    settings: Sequence[Setting], asked: Asked, baseline: Setting | None = None
) -> Answer | None:
    """The answer, or None where no two settings have a metric that says what is good.

    Args:
        baseline: what settings are compared with, if not what `asked` names.

    Raises:
        UserError: the metric or the baseline that is asked for is not there.
    """
    points = [point for setting in settings for point in setting.points]
    there = [m for m in dict.fromkeys(m for p in points for m in p.metrics) if _is_metric(m)]
    if not there:  # Nothing has finished yet, or all has failed.
        return None
    scored = dict.fromkeys(name for point in points for name in point.scored.values)
    metric = chosen.metric(asked, there, scored)
    if metric is None:
        return None
    held = [value for setting in settings if (value := value_of(setting, metric)) is not None]
    values = alike_values(held, metric)
    if len(values) < 2:
        return None
    lower = chosen.lower_is_better(asked, metric)
    ranked = sorted(values, key=lambda value: value.mean.value if lower else -value.mean.value)
    if baseline is None and asked.baseline is not None:
        baseline = named([value.setting for value in values], asked.baseline)
    given = baseline is not None
    base = next((value for value in ranked if value.setting is baseline), ranked[0])
    # Who is compared with the best has been compared with all to find it.
    count = len(values) - 1 if given else len(values) * (len(values) - 1) // 2
    return Answer(
        metric,
        lower,
        base.setting,
        given,
        base.of,
        count,
        tuple(_entries(ranked, base, metric, lower, count)),
        len(settings) - len(values),
    )


def _is_metric(name: str) -> bool:
    return not name.endswith("_error")


def value_of(setting: Setting, metric: str) -> Value | None:
    """What a setting has of a metric: of its units, or else one value a seed."""
    if units := setting.units(metric):
        values = setting.values(metric, list(units))
        of = setting.of(metric)
        mean = statistics.mean_of(values, crossed=of not in DRAWN_ANEW)
        return Value(setting, mean, of, len(units))
    return value_of_seeds(setting, metric) if setting.of_seeds(metric) else None


def alike_values(values: Sequence[Value], metric: str) -> list[Value]:
    """Values that can be compared: where some have units and others none, as of records that are
    older than scores.jsonl, all are those of seeds."""
    if len({value.of for value in values}) > 1:
        return [value_of_seeds(value.setting, metric) for value in values]
    return list(values)


def value_of_seeds(setting: Setting, metric: str) -> Value:
    """The same of what each seed has of all units at once."""
    seeds = list(setting.of_seeds(metric).values())
    mean = statistics.mean_of(np.array(seeds, np.float64)[:, None], crossed=False)
    return Value(setting, mean, "seed", len(seeds))


def _entries(
    ranked: Sequence[Value], base: Value, metric: str, lower: bool, count: int
) -> list[Entry]:
    differences = {id(v): difference(v, base, metric) for v in ranked if v is not base}
    tested = [v for v in ranked if v is not base and differences[id(v)].p is not None]
    p = [_known(differences[id(value)].p) for value in tested]
    corrected = dict(zip(map(id, tested), statistics.holm(p, count), strict=True))
    levels = dict(zip(map(id, tested), statistics.levels(p, count), strict=True))
    entries = []
    for value in ranked:
        entry = Entry(value.setting, value.mean.value, value.mean.error, value.units)
        if value is not base:
            found = differences[id(value)]
            entry = dataclasses.replace(
                entry,
                **_judged(found, value, lower, corrected.get(id(value)), levels.get(id(value))),
            )
        entries.append(entry)
    return entries


def _known(p: float | None) -> float:
    assert p is not None
    return p


def difference(value: Value, base: Value, metric: str) -> Difference:
    """A value's metric less the baseline's, over what both have."""
    if value.of == base.of == "seed":
        ours, theirs = (v.setting.of_seeds(metric) for v in (value, base))
        both = [seed for seed in ours if seed in theirs]
        if len(both) == len(ours) == len(theirs):
            ours_of, theirs_of = _column(ours, both), _column(theirs, both)
            return statistics.paired(ours_of, theirs_of, crossed=False, verdicts=False)
        return statistics.unpaired(list(ours.values()), list(theirs.values()))
    known = base.setting.units(metric)
    shared = [unit for unit in value.setting.units(metric) if unit in known]
    if value.of == UNPAIRED or len(shared) < 2 <= min(value.units, base.units):
        one, other = (
            v.setting.values(metric, list(v.setting.units(metric))).mean(axis=1)
            for v in (value, base)
        )
        return statistics.unpaired(one.tolist(), other.tolist())
    ours_at, theirs_at = (v.setting.values(metric, shared) for v in (value, base))
    crossed = value.of not in DRAWN_ANEW and _seeds(value) == _seeds(base)
    return statistics.paired(ours_at, theirs_at, crossed=crossed)


def _seeds(value: Value) -> list[Any]:
    return [point.overrides.get(SEED) for point in value.setting.points]


def _column(values: dict[Any, float], seeds: Sequence[Any]) -> np.ndarray:
    return np.array([[values[seed]] for seed in seeds], np.float64)


def _judged(
    found: Difference,
    value: Value,
    lower: bool,
    corrected: float | None,
    level: float | None,
) -> dict[str, Any]:
    """The fields of an entry that say how it compares."""
    seen = found.mean.value
    fields: dict[str, Any] = {"difference": seen, "test": found.test}
    if corrected is None or level is None:
        text = f"not tested: {found.test}"
        return fields | {"verdict": "not tested", "text": text}
    limits = found.interval(level)
    low, high = limits or (None, None)
    fields |= {"p": corrected, "low": low, "high": high}
    outside = low is None or high is None or not low <= 0 <= high
    if corrected < statistics.LEVEL and outside:
        verdict = "better" if (seen < 0) == lower else "worse"
        return fields | {"verdict": verdict, "text": verdict}
    return fields | {"verdict": "not told apart", "text": _what_it_takes(found, value, level)}


def _what_it_takes(found: Difference, value: Value, level: float) -> str:
    kind = "seed" if value.of == "seed" else value.of
    if found.mean.error in (None, 0):
        return "no difference seen"
    if found.mean.value:
        needed = statistics.units_needed(found, value.units, level)
        if needed == math.inf:
            return "needs more seeds to tell"
        if needed <= _MANY_TIMES * value.units:
            more = _round_up(needed - value.units)
            return f"needs about {more:,} more {kind}{'s' * (more > 1)} to tell"
    least = statistics.smallest_seen(found, level)
    return f"no difference seen ({float(f'{least:.2g}'):,g} would show)"


def _round_up(count: float) -> int:
    """To two digits, and at least one."""
    whole = max(1, math.ceil(count))
    step = 10 ** max(0, len(str(whole)) - 2)
    return -(-whole // step) * step
