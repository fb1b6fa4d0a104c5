"""Experiments from Python: run, read, compare."""

import dataclasses
import os
import pprint
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen_jax import settings, task_fields
from qwen_jax.errors import UserError
from qwen_jax.experiments import ahead, declaration, plan, records
from qwen_jax.experiments.answers import answer as answers
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.experiments.answers.settings import Setting, named
from qwen_jax.experiments.report.answer import name as name_of
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.report.tables import number
from qwen_jax.experiments.runner import Runner
from qwen_jax.experiments.sweep import Sweep

Row = dict[str, Any]

_WHO = "experiments.run()"
_OF_END = ("seconds", "compile_seconds", "peak_bytes", "kind", "reason")
_SOURCE = '''"""{title}"""

from ml_collections import ConfigDict

from qwen_jax.experiments import Sweep
from qwen_jax.settings import get_config as defaults


def get_config() -> ConfigDict:
    config = defaults()
    config.update_from_flattened_dict(
        {changed}
    )
    return config


def get_sweep() -> Sweep:
    return {sweep}
'''


def run(
    config: ConfigDict | Mapping[str, Any],
    sweep: Sweep,
    workdir: str | os.PathLike[str],
    *,
    title: str = "An experiment from Python.",
    shard: str | None = None,
    retry_failed: bool = False,
    max_time: float | None = None,
) -> list[Row]:
    """Runs what the workdir doesn't have yet, and returns what it has then, as `load_results` does.

    The workdir is as `run.py experiment` makes it, with a config file of its own, which that
    command goes on with.

    Args:
        config: a config as `qwen_jax.settings.get_config` makes it, or fields that differ from it,
            by their dotted names, as in {"experiment.scores": ("haiku",)}.
        sweep: points, as `product(axis("sampling.temperature", [0, 1]))` makes them.
        shard: "i/n" runs the i-th of n parts into a directory of its own in the workdir.
        retry_failed: whether points that have failed are run once more.
        max_time: seconds after which no more is begun; a later call goes on.

    Raises:
        UserError: as the command would; a point that fails is a row with its reason.
    """
    whole = _config(config)
    fields = sorted(settings.asked(whole))
    task_fields.check("experiment", ((f"{field}, which {_WHO} gets,", field) for field in fields))
    declared = declaration.declared(
        whole,
        list(sweep),
        _WHO,
        name=_WHO,
        source=lambda changed: _source(title, changed, sweep),
    )
    asked = Asked.of(whole.answer)
    whole_plan = plan.plan(declared.points)
    ahead.check(whole_plan, asked)
    planned = plan.part_of(whole_plan, shard)
    directory = plan.shard_directory(Path(workdir), shard)
    points = [item.point for item in planned]
    described = records.described(declared, points, shard)
    opened = records.Records(directory, described, declared.source)
    try:
        runner = Runner(
            opened,
            command=_WHO,
            retry_failed=retry_failed,
            profile=False,
            asked=asked,
            max_time=max_time,
            stop_worse=whole.runner.stop_worse,
        )
        runner.run(planned)
    finally:
        opened.close()
    return load_results(directory)


def _config(given: ConfigDict | Mapping[str, Any]) -> ConfigDict:
    if isinstance(given, ConfigDict):
        return given.copy_and_resolve_references()
    config = settings.get_config()
    settings.update(config, given, _WHO)
    return config


def _source(title: str, changed: Mapping[str, Any], sweep: Sweep) -> str:
    shown = (pprint.pformat(value, width=88, sort_dicts=False) for value in (dict(changed), sweep))
    fields, points = (text.replace("\n", "\n        ") for text in shown)
    quoted = title.replace("\\", "\\\\").replace('"', '\\"')
    return _SOURCE.format(title=quoted, changed=fields, sweep=points)


def load_results(workdir: str | os.PathLike[str], *more: str | os.PathLike[str]) -> list[Row]:
    """One row a point, each with the same keys, which pandas.DataFrame and polars.DataFrame take.

    A row has `run`, `point`, `state` ("ok", "failed" or "missing"), each field that the sweep sets
    by its dotted name, each metric, and how the point ended; None where a point lacks something.

    Raises:
        UserError: a directory holds no experiment, or a damaged one.
    """
    results = Results.read([Path(path) for path in (workdir, *more)])
    fields = dict.fromkeys(field for row in results.rows for field in row.overrides)
    metrics = dict.fromkeys(metric for row in results.rows for metric in row.metrics)
    return [
        {
            "run": row.run,
            "point": row.id,
            "state": row.state,
            **{field: _listed(row.overrides.get(field)) for field in fields},
            **{metric: row.metrics.get(metric) for metric in metrics},
            **{name: row.end.get(name) for name in _OF_END},
        }
        for row in results.rows
    ]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One setting against another.

    Attributes:
        metric: on which; higher_is_better says which end of it is the good one.
        a, b: their names, and their means over prompts and seeds.
        difference: of a less b, with the interval from `low` to `high`, which holds it with 95 %.
        p: how likely luck alone makes at least as much.
        units: how many prompts, documents or windows both have, with so many seeds.
        test: what gave p.
        verdict: "better" or "worse", of a; "not told apart"; or "not tested".
        text: the verdict, and what it would take.
    """

    metric: str
    higher_is_better: bool
    a: str
    b: str
    mean_a: float
    mean_b: float
    difference: float
    low: float | None
    high: float | None
    p: float | None
    units: int
    seeds: int
    test: str
    verdict: str
    text: str

    def __str__(self) -> str:
        said = f"{self.metric}: {self.a} {number(self.mean_a)}, {self.b} {number(self.mean_b)}"
        if self.low is None or self.high is None or self.p is None:
            return f"{said}; {self.text}"
        return (
            f"{said}; difference {self.difference:+.3g} ({self.low:+.3g} to {self.high:+.3g}), "
            f"p = {self.p:.2g}: {self.text}"
        )


Named = str | os.PathLike[str] | tuple[str | os.PathLike[str], str]


def compare(a: Named, b: Named, *, metric: str | None = None, better: str = "auto") -> Comparison:
    """Whether a is better than b, paired by prompt as in reports.

    Args:
        a, b: workdirs; with a setting, as in ("runs/a", "temperature=0"), where one has several.
        metric: which, if not the one that reports would rank on.
        better: "higher" or "lower" for a metric of your own of which less is better.

    Raises:
        UserError: there is no such workdir, setting or metric.
    """
    asked = Asked.of({"metric": metric, "better": better})
    directories = list(dict.fromkeys(_directory(one) for one in (a, b)))
    results = Results.read(directories, asked)
    run_of = dict(zip(directories, results.names, strict=True))
    ours, theirs = (_setting(results, run_of[_directory(one)], one) for one in (a, b))
    if ours is theirs:
        raise UserError(f"{_said(a)} and {_said(b)} are one setting; name two.")
    found = answers.answer([ours, theirs], results.asked, theirs)
    if found is None:
        raise UserError(f"{_said(a)} and {_said(b)} have no score in common; name a metric.")
    by = {id(entry.setting): entry for entry in found.entries}
    one, other = by[id(ours)], by[id(theirs)]
    assert one.difference is not None
    several = ours.run != theirs.run
    return Comparison(
        metric=found.metric,
        higher_is_better=not found.lower,
        a=name_of(ours, several),
        b=name_of(theirs, several),
        mean_a=one.mean,
        mean_b=other.mean,
        difference=one.difference,
        low=one.low,
        high=one.high,
        p=one.p,
        units=one.units,
        seeds=one.seeds,
        test=one.test,
        verdict=one.verdict,
        text=one.text,
    )


def _directory(one: Named) -> Path:
    return Path(one[0] if isinstance(one, tuple) else one)


def _said(one: Named) -> str:
    return f"{one[0]}, {one[1]}," if isinstance(one, tuple) else str(one)


def _setting(results: Results, run: str, one: Named) -> Setting:
    settings_of: Sequence[Setting] = [s for s in results.settings if s.run == run]
    if isinstance(one, tuple):
        return named(settings_of, one[1])
    if len(settings_of) != 1:
        raise UserError(
            f"{one} has {len(settings_of)} settings that have finished; name one, as in "
            f'("{one}", "temperature=0").'
        )
    return settings_of[0]
