"""Experiments that end before all points are run: by the clock, or because a setting can't win."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.experiments import axis, when
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.task import Work
from tests.experiments.conftest import lines
from tests.experiments.fake import ITEMS, Count


def test_conditional_axes() -> None:
    temperatures = axis("t", [0, 1])
    seeds = axis("seed", [5, 6])
    expected = [{"t": 0}, {"t": 1, "seed": 5}, {"t": 1, "seed": 6}]
    assert when(temperatures, {"t": 1}, seeds) == expected
    assert when(temperatures, lambda point: point["t"] > 0, seeds) == expected
    other = when(temperatures, {"t": 1}, seeds, otherwise=axis("k", [2]))
    assert other == [{"t": 0, "k": 2}, *expected[1:]]
    assert when(temperatures, {"u": 1}, seeds) == temperatures


def test_the_clock_leaves_the_rest_for_another_time(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Time is up in the midst of the second point, whose items are kept."""
    now = 1000.0
    monkeypatch.setattr("qwen_jax.experiments.stopping.time.monotonic", lambda: now)
    real = Count.run

    def metrics(task: Count, work: Work) -> dict[str, float]:
        record = work.record

        def slowly(**item: object) -> None:
            nonlocal now
            now += 1
            record(**item)

        monkeypatch.setattr(work, "record", slowly)
        return real(task, work)

    monkeypatch.setattr(Count, "run", metrics)
    argv = experiment('axis("sampling.seed", [1, 2, 3])')
    result = run(*argv, "--max_time=15")
    w = tmp_path / "w"
    assert result.code == 1
    assert (
        f"--max_time=15 is over and {w} has 1 of 3 points; the same command goes on" in result.err
    )
    counts = collections.Counter(line["point"] for line in lines(w / "outputs.jsonl"))
    assert sorted(counts.values()) == [3, ITEMS]
    assert lines(w / "metrics.jsonl")[-1]["event"] == "interrupted"
    assert run(*argv, "--max_time=1000").code == 0
    assert {r.state for r in Results.read([w]).rows} == {"ok"}
    assert len(lines(w / "outputs.jsonl")) == 3 * ITEMS


def test_no_time_at_all(experiment: Callable[..., list[str]], refuses: Callable[..., None]) -> None:
    refuses([*experiment(), "--max_time=0"], "--max_time is 0, but it must be a number of seconds")


@pytest.fixture
def worth(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Eight tokens are much worse than six and seven, on every prompt. Which points have run."""
    ran: list[tuple[int, int]] = []

    def metrics(task: Count, work: Work) -> dict[str, float]:
        tokens, seed = task.config.max_tokens, task.config.sampling.seed
        ran.append((tokens, seed))
        noise = np.random.default_rng([tokens, seed]).normal(size=30)
        values = np.arange(30.0) + noise - 5 * (tokens == 8)
        for unit, value in enumerate(values):
            work.score("prompt", unit, unit, {"worth": float(value)})
        return {"worth": float(values.mean())}

    monkeypatch.setattr(Count, "run", metrics)
    return ran


SWEEP = 'product(axis("sampling.seed", [0, 1, 2]), axis("max_tokens", [6, 8, 7]))'


def test_what_can_not_win_is_left_out_and_recorded(
    worth: list[tuple[int, int]],
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
) -> None:
    result = run(*experiment(SWEEP), "--stop_worse")
    assert result.code == 0 and "7 finished, 2 left out." in result.out
    assert worth == [(6, 0), (8, 0), (7, 0), (6, 1), (7, 1), (6, 2), (7, 2)]
    events = [e for e in lines(tmp_path / "w" / "metrics.jsonl") if e["event"] == "skipped"]
    assert len(events) == 2 and "which is worse than the" in events[0]["reason"]
    with (tmp_path / "w" / "results.json").open() as file:
        states = collections.Counter(point["state"] for point in json.load(file)["points"])
    assert states == {"ok": 7, "skipped": 2}
    # Without the flag they are run.
    assert run(*experiment(SWEEP)).code == 0
    assert worth[7:] == [(8, 1), (8, 2)]
    assert {row.state for row in Results.read([tmp_path / "w"]).rows} == {"ok"}


def test_all_are_run_unless_somebody_asks(
    worth: list[tuple[int, int]], experiment: Callable[..., list[str]], run: Callable
) -> None:
    assert run(*experiment(SWEEP)).code == 0 and len(worth) == 9
