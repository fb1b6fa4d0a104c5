"""Points that differ in their seed alone are one setting, with a value for each seed."""

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.experiments.contents import Contents
from qwen_jax.experiments.declaration import label, one_line, short

SEED = "sampling.seed"
UNPAIRED = "repeat"
"""The kind of unit of which one point's has nothing to do with another's."""
DRAWN_ANEW = ("prompt",)
"""Kinds of units for each of which a seed draws something else, so that it shifts none alike."""

Units = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What units of a point scored.

    Attributes:
        of: the kind of unit, by metric.
        values: by metric and by the unit's name.
    """

    of: Mapping[str, str] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Units] = dataclasses.field(default_factory=dict)


def scored(content: Contents) -> dict[str, Scored]:
    """By point; a name that several units of a point have is told apart by which came first."""
    found: dict[str, _Lines] = collections.defaultdict(lambda: collections.defaultdict(dict))
    for line in content.scores():
        units = found[line["point"]][line["of"]]
        # Scores that were computed again replace those of their names alone.
        kept = units[line["unit"]][1] if line["unit"] in units else {}
        units[line["unit"]] = json.dumps(line["id"]), kept | line["scores"]
    return {point: _of_point(units) for point, units in found.items()}


_Lines = dict[str, dict[int, tuple[str, dict[str, float]]]]
"""By kind and number of a unit, its name and what it scored."""


def _of_point(lines: _Lines) -> Scored:
    values: dict[str, Units] = collections.defaultdict(dict)
    kinds = {}
    for of, units in lines.items():
        names = names_of({unit: name for unit, (name, _) in units.items()})
        for unit, (_, scores) in sorted(units.items()):
            for metric, value in scores.items():
                kinds[metric] = of
                values[metric][names[unit]] = value
    return Scored(kinds, dict(values))


def names_of(units: Mapping[int, str]) -> dict[int, str]:
    """Each unit's name in every point: what it is called there, and which of that name it is."""
    seen: collections.Counter[str] = collections.Counter()
    found = {}
    for unit, name in sorted(units.items()):
        seen[name] += 1
        found[unit] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return found


@dataclasses.dataclass(frozen=True)
class Point:
    """What is known of one that has ended well."""

    run: str
    id: str
    overrides: Mapping[str, Any]
    metrics: Mapping[str, float]
    scored: Scored


@dataclasses.dataclass(frozen=True)
class Setting:
    """Points that differ in their seed alone, in the order of the sweep.

    Attributes:
        overrides: what they share of what the sweep sets.
    """

    run: str
    overrides: Mapping[str, Any]
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        return label(self.overrides)

    def of(self, metric: str) -> str:
        """The kind of the units that have a metric, "" where none has."""
        return self.points[0].scored.of.get(metric, "")

    @property
    def seeds(self) -> int:
        return len(self.points)

    def values(self, metric: str, units: Sequence[str]) -> np.ndarray:
        """Of these units, in this order, in a column a seed."""
        columns = [point.scored.values[metric] for point in self.points]
        return np.array([[column[unit] for column in columns] for unit in units], np.float64)

    def units(self, metric: str) -> dict[str, None]:
        """Names of the units that every seed has, in their order."""
        first, *others = (point.scored.values.get(metric, {}) for point in self.points)
        return {unit: None for unit in first if all(unit in other for other in others)}

    def of_seeds(self, metric: str) -> dict[Any, float]:
        """A value a seed, where the metric is known of all of its units at once."""
        return {
            point.overrides.get(SEED): point.metrics[metric]
            for point in self.points
            if metric in point.metrics
        }


def grouped(points: Iterable[Point], varying: Iterable[str]) -> list[Setting]:
    """Settings in the order of their first points.

    Args:
        varying: the fields with more than one value, which tell settings apart.
    """
    told = [field for field in varying if field != SEED]
    found: dict[str, list[Point]] = {}
    for point in points:
        key = json.dumps([point.run, [point.overrides.get(field) for field in told]])
        found.setdefault(key, []).append(point)
    return [
        Setting(some[0].run, {f: some[0].overrides.get(f) for f in told}, tuple(some))
        for some in found.values()
    ]


def named(settings: Sequence[Setting], text: str) -> Setting:
    """The one setting that a text such as "temperature=0,top_p=0.9" names, or a run's name.

    Raises:
        UserError: it names none, or several.
    """
    found = [s for s in settings if s.run == text]
    if not found:
        wanted = list(_pairs(text))
        found = [s for s in settings if all(_has(s, name, value) for name, value in wanted)]
    if len(found) == 1:
        return found[0]
    several = len({setting.run for setting in settings}) > 1
    way = "; ".join(f"{s.run}: {s.label}" if several else s.label for s in settings[:8])
    more = f" and {len(settings) - 8} more" if len(settings) > 8 else ""
    how = "none of the settings" if not found else f"{len(found)} settings; name one of them"
    if len(settings) == 1 and not settings[0].overrides:
        raise UserError(
            f"The baseline {text!r:.80} names no setting: there is one alone, whose points differ "
            "in their seed."
        )
    raise UserError(f"The baseline {text!r:.80} is {how}. There are {way}{more}.")


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(
                f"The baseline {text!r:.80} must say what it sets, as in temperature=0,top_p=0.9."
            )
        yield name.strip(), value.strip()


def _has(setting: Setting, name: str, value: str) -> bool:
    if name == "run":
        return setting.run == value
    for field, own in setting.overrides.items():
        if name in (field, short(field)):
            return value == one_line(own) or _number(value) == own is not None
    return False


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
