"""Experiments side by side: settings that both have, and what is different between them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence

from qwen_jax.experiments.answers import statistics
from qwen_jax.experiments.answers.answer import (
    Value,
    alike_values,
    difference,
    value_of,
)
from qwen_jax.experiments.answers.settings import SEED, Setting
from qwen_jax.experiments.answers.statistics import LEVEL, Difference
from qwen_jax.experiments.declaration import clipped, short
from qwen_jax.experiments.report.answer import probability
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.report.tables import differing_metrics, number, shown
from qwen_jax.reporting.table import Rounded, Table


@dataclasses.dataclass(frozen=True)
class Pair:
    """One setting of two experiments."""

    first: Setting
    other: Setting


def pairs(results: Results, other: str) -> list[Pair]:
    """The settings that the first experiment has, and the one of this name: those of the same
    values of all that is swept, but for what is fixed in each and differs between them."""
    fields = [field for field in results.swept_within if field != SEED]

    def of(run: str) -> dict[str, Setting]:
        return {
            json.dumps([setting.overrides.get(field) for field in fields]): setting
            for setting in results.settings
            if setting.run == run
        }

    first, second = of(results.names[0]), of(other)
    return [Pair(setting, second[key]) for key, setting in first.items() if key in second]


def tables(results: Results, most: int | None = None) -> Iterator[Table]:
    """A table for every experiment but the first, of the settings that both have: each metric in
    both, and its difference, marked where it is no luck.

    Args:
        most: metrics that it has, beginning with the one that the answer is about.
    """
    fields = [field for field in results.swept_within if field != SEED]
    for other in results.names[1:]:
        common = pairs(results, other)
        metrics = [name for name in _ordered(results) if _has(common, name)][:most]
        columns = {name: _column(common, name) for name in metrics}
        if common and metrics:
            header = [*map(short, fields)]
            for name in metrics:
                header += [f"{name}: {run}" for run in (results.names[0], other, "difference")]
            lines = []
            for index, pair in enumerate(common):
                line = [clipped(shown(pair.first.overrides.get(field))) for field in fields]
                for name in metrics:
                    line += columns[name][index]
                lines.append(line)
            yield Table(header, lines, range(len(header)), _caption(results, other, len(common)))


def _caption(results: Results, other: str, common: int) -> str:
    first = results.names[0]
    count = sum(setting.run == first for setting in results.settings)
    theirs = sum(setting.run == other for setting in results.settings)
    return (
        f"{common} settings that {first} (of {count}) and {other} (of {theirs}) have both. A "
        f"difference is {other} less {first}, paired by what each setting has; * is below "
        f"{LEVEL:.0%} by Holm's correction for the settings of a metric."
    )


def _ordered(results: Results) -> list[str]:
    ranked = [results.answer.metric] if results.answer else []
    names = differing_metrics(results)
    return [name for name in dict.fromkeys([*ranked, *names]) if name in names]


def _has(common: Sequence[Pair], metric: str) -> bool:
    return any(_values(pair, metric) for pair in common)


def _values(pair: Pair, metric: str) -> tuple[Value, Value] | None:
    first, other = (value_of(setting, metric) for setting in (pair.first, pair.other))
    if first is None or other is None:
        return None
    first, other = alike_values([first, other], metric)
    return first, other


def _column(common: Sequence[Pair], metric: str) -> list[tuple[str, str, str]]:
    """Of each pair both values and the difference; its p is corrected for all of them."""
    found = [_values(pair, metric) for pair in common]
    between = [None if held is None else difference(held[1], held[0], metric) for held in found]
    p = {i: d.p for i, d in enumerate(between) if d is not None and d.p is not None}
    corrected = dict(zip(p, statistics.holm(list(p.values())), strict=True))
    lines = []
    for index, (held, one) in enumerate(zip(found, between, strict=True)):
        if held is None or one is None:
            lines.append(("-", "-", "-"))
            continue
        sure = corrected.get(index)
        mark = "*" if sure is not None and sure < LEVEL else ""
        full = f"{one.mean.value!r}" + ("" if sure is None else f", p = {probability(sure)}")
        first, other = held
        lines.append((_said(first), _said(other), Rounded.of(f"{_signed(one)}{mark}", full)))
    return lines


def _said(value: Value) -> str:
    return number(value.mean.value, value.mean.error)


def _signed(found: Difference) -> str:
    text = number(abs(found.mean.value), found.mean.error)
    return f"{'-' if found.mean.value < 0 else '+'}{text}"
