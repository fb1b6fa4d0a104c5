"""Experiments from Python: run, read, compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from qwen_jax import experiments
from qwen_jax.errors import UserError
from qwen_jax.experiments import axis, product
from qwen_jax.experiments.task import Work
from qwen_jax.settings import get_config
from tests.experiments.fake import Count

COUNT = {"experiment.task": "tests.experiments.fake:Count"}
SWEEP = product(axis("max_tokens", [6, 8]), axis("sampling.seed", [0, 1]))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is hard is hard for all, and longer texts are a little better; prompts are twenty."""

    def metrics(task: Count, work: Work) -> dict[str, float]:
        tokens, seed = task.config.max_tokens, task.config.sampling.seed
        noise = np.random.default_rng([tokens, seed]).normal(size=20)
        values = np.arange(20.0) + tokens + noise
        for unit, value in enumerate(values):
            work.score("prompt", unit, unit, {"worth": float(value)})
        return {"worth": float(values.mean())}

    monkeypatch.setattr(Count, "run", metrics)


def test_run_returns_what_the_workdir_has(tmp_path: Path, run: Callable) -> None:
    sweep = axis("max_tokens", [6, 4])
    rows = experiments.run(COUNT, sweep, tmp_path / "w", title='A "title".')
    assert [(row["max_tokens"], row["state"], row["total"]) for row in rows] == [
        (6, "ok", 66.0),
        (4, "failed", None),
    ]
    assert rows[1]["reason"] == "ZeroDivisionError: by accident"
    assert experiments.load_results(tmp_path / "w") == rows
    # A config does as well as its fields, and a second call has nothing left to do.
    config = get_config()
    config.experiment.task = COUNT["experiment.task"]
    assert experiments.run(config, sweep, tmp_path / "w", title='A "title".') == rows
    # The command goes on with the file that is kept.
    file = tmp_path / "w" / "config.py"
    result = run("experiment", f"--config={file}", f"--workdir={tmp_path / 'w'}", "--retry_failed")
    assert result.code == 1 and 'A "title".' in result.err


def test_rows_are_tables_of_pandas_and_polars(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    sweep = [{"max_tokens": 6}, {"max_tokens": 7, "stop": ("a", "b")}]
    rows = experiments.run(COUNT, sweep, tmp_path / "w")
    frame = pandas.DataFrame(rows)
    assert frame["total"].tolist() == [66, 66] and frame["stop"].tolist() == [[], ["a", "b"]]
    polars = pytest.importorskip("polars")
    assert polars.DataFrame(rows)["total"].to_list() == [66, 66]


@pytest.mark.usefixtures("judged")
def test_compare_is_a_paired_test(tmp_path: Path) -> None:
    w = tmp_path / "w"
    experiments.run(COUNT, SWEEP, w)
    found = experiments.compare((w, "max_tokens=8"), (w, "max_tokens=6"))
    assert (found.metric, found.verdict, found.units, found.seeds) == ("worth", "better", 20, 2)
    assert (found.a, found.b) == ("max_tokens=8", "max_tokens=6")
    rows = experiments.load_results(w)
    means = {t: np.mean([r["worth"] for r in rows if r["max_tokens"] == t]) for t in (6, 8)}
    assert found.difference == pytest.approx(means[8] - means[6])
    noise = {
        t: np.mean([np.random.default_rng([t, s]).normal(size=20) for s in (0, 1)], axis=0)
        for t in (6, 8)
    }
    expected = stats.ttest_1samp(2 + noise[8] - noise[6], 0)
    assert found.p is not None and math.log(found.p) == pytest.approx(
        math.log(expected.pvalue), rel=0.3
    )
    assert "difference +" in str(found) and str(found).endswith("better")
    turned = experiments.compare(
        (w, "max_tokens=6"), (w, "max_tokens=8"), metric="worth", better="lower"
    )
    assert turned.verdict == "better" and turned.difference == -found.difference


@pytest.mark.usefixtures("judged")
def test_compare_takes_workdirs(tmp_path: Path) -> None:
    for tokens in (6, 8):
        experiments.run({**COUNT, "max_tokens": tokens}, [{}], tmp_path / str(tokens))
    found = experiments.compare(tmp_path / "8", tmp_path / "6")
    assert found.verdict == "better" and (found.a, found.b) == ("8 max_tokens=8", "6 max_tokens=6")


@pytest.mark.parametrize(
    ("config", "sweep", "words"),
    [
        ({"max_tokns": 3}, [{}], r"experiments.run\(\) sets max_tokns, which is no field; did you"),
        ({"output": "x"}, [{}], r"output, which experiments.run\(\) gets, does nothing for"),
        ({}, [], r"experiments.run\(\): the sweep has no points"),
        ({}, axis("max_tokens", ["a"]), "point 1 of the sweep sets max_tokens to 'a'"),
        ({"answer.better": "more"}, [{}], "answer.better is 'more'"),
    ],
)
def test_refused_before_anything_runs(
    tmp_path: Path, config: dict[str, Any], sweep: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        experiments.run(COUNT | config, sweep, tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.usefixtures("judged")
def test_what_can_not_be_compared(tmp_path: Path) -> None:
    w = tmp_path / "w"
    experiments.run(COUNT, SWEEP, w)
    with pytest.raises(UserError, match=r"has 2 settings that have finished; name one, as in"):
        experiments.compare(w, w)
    with pytest.raises(UserError, match="are one setting; name two"):
        experiments.compare((w, "max_tokens=6"), (w, "max_tokens=6"))
    with pytest.raises(UserError, match="is none of the settings"):
        experiments.compare((w, "max_tokens=6"), (w, "max_tokens=7"))
    with pytest.raises(UserError, match="--metric=x is no metric of these points"):
        experiments.compare((w, "max_tokens=6"), (w, "max_tokens=8"), metric="x")
