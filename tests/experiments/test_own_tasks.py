"""Tasks of somebody's own that do what no task should: a sentence, and records that can be read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.experiments.task import Task, Work
from tests.experiments import fake
from tests.experiments.conftest import lines


def _exits(work: Work) -> Any:
    sys.exit(3)


def _scores(unit: int, name: Any) -> Callable[[Work], Any]:
    def run(work: Work) -> Any:
        work.score("prompt", unit, name, {"v": 1.0})
        return {"v": 1.0}

    return run


@pytest.mark.parametrize(
    ("returns", "reason"),
    [
        (lambda work: 5, "The metrics are 5, but they must be numbers by name."),
        (lambda work: {"v": "good"}, "The metrics {'v': 'good'} are not finite numbers."),
        (lambda work: {"v": 10**400}, "are not finite numbers."),
        (_exits, "SystemExit: 3"),
        (_scores(-1, "a"), "'unit' is -1, but it must be a number from 0 on."),
        (_scores(0, ["a"]), "'id' is ['a'], but it must be a text or a number."),
    ],
)
def test_what_can_not_be_recorded_fails_the_point(
    experiment: Callable[..., list[str]],
    run: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    returns: Callable[[Work], Any],
    reason: str,
) -> None:
    monkeypatch.setattr(fake.Count, "run", lambda self, work: returns(work))
    result = run(*experiment('axis("sampling.seed", [0, 1])'))
    assert result.code == 1 and result.out.count("failed: seed=") == 2
    ends = [e for e in lines(tmp_path / "w" / "metrics.jsonl") if e["event"] == "failed"]
    assert len(ends) == 2 and ends[0]["reason"].endswith(reason)
    assert run("report", str(tmp_path / "w")).code == 0


@pytest.mark.parametrize("value", [True, np.float32(1), np.bool_(True), np.array(1)])
def test_numbers_of_other_types(
    experiment: Callable[..., list[str]],
    run: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    value: Any,
) -> None:
    monkeypatch.setattr(fake.Count, "run", lambda self, work: {"v": value})
    assert run(*experiment("[{}]")).code == 0
    (end,) = (e for e in lines(tmp_path / "w" / "metrics.jsonl") if e["event"] == "finished")
    assert end["metrics"] == {"v": 1} and not isinstance(end["metrics"]["v"], bool)


class NotWhole(Task):
    """One without `run`."""


def test_a_class_that_can_not_be_made(
    experiment: Callable[..., list[str]], refuses: Callable[..., None]
) -> None:
    argv = experiment("[{}]", f"config.experiment.task = '{__name__}:NotWhole'")
    refuses(argv, "which can't be made: TypeError: Can't instantiate abstract class NotWhole")


def test_a_baseline_where_there_is_one_setting(
    experiment: Callable[..., list[str]], refuses: Callable[..., None]
) -> None:
    argv = experiment('axis("sampling.seed", [0, 1])')
    refuses([*argv, "--baseline=seed=0"], "names no setting: there is one alone, whose points diff")
