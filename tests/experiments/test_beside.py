"""Experiments side by side, and environments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qwen_jax.experiments.report import beside, plots
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.task import Work
from tests.experiments.conftest import lines
from tests.experiments.fake import Count
from tests.reporting.opened import Opened

pytest.importorskip("matplotlib")


def worth(run: int, tokens: int) -> np.ndarray:
    """Of twelve prompts; the second run is better by 1 at 7 tokens alone."""
    hard = 5 * np.arange(12.0)
    better = float(run == 1 and tokens == 7)
    return hard + better + 0.3 * np.random.default_rng([run, tokens]).normal(size=12)


@pytest.fixture
def two(
    monkeypatch: pytest.MonkeyPatch, experiment: Callable[..., list[str]], run: Callable
) -> Results:
    """Experiments a, of 6, 7 and 8 tokens, and b, of 7, 8 and 9."""

    def metrics(task: Count, work: Work) -> dict[str, float]:
        values = worth(int(task.config.system == "b"), task.config.max_tokens)
        for unit, value in enumerate(values):
            work.score("prompt", unit, unit, {"worth": float(value)})
        return {"worth": float(values.mean())}

    monkeypatch.setattr(Count, "run", metrics)
    a = experiment('axis("max_tokens", [6, 7, 8])', workdir="a")
    assert run(*a).code == 0
    b = experiment('axis("max_tokens", [7, 8, 9])', 'config.system = "b"', workdir="b")
    assert run(*b).code == 0
    workdirs = [Path(next(w for w in argv if "workdir" in w).partition("=")[2]) for argv in (a, b)]
    return Results.read(workdirs)


def test_settings_that_both_have_are_paired(two: Results, run: Callable, tmp_path: Path) -> None:
    (table,) = beside.tables(two)
    header = ["max_tokens", "worth: a", "worth: b", "worth: difference"]
    assert [*table.header] == header and [line[0] for line in table.rows] == ["7", "8"]
    assert table.caption.startswith("2 settings that a (of 3) and b (of 3) have both.")
    for line, tokens, marked in zip(table.rows, (7, 8), ("*", ""), strict=True):
        differences = worth(1, tokens) - worth(0, tokens)
        p = 2 * stats.ttest_1samp(differences, 0).pvalue
        assert (p < 0.05) == bool(marked), "the example is no example"
        assert line[3].endswith("*") == bool(marked)
        assert float(line[3].split()[0]) == pytest.approx(differences.mean(), abs=0.05)
    result = run("report", *(str(content.path) for content in two.contents))
    page = Opened((tmp_path / "a+b.html").read_text())
    assert header in page.headers and "a and b: What this is about." in page.text
    assert "settings that a (of 3) and b (of 3)" in result.out


def test_nothing_in_common_is_no_table(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    run(*experiment('axis("max_tokens", [6, 7])', workdir="a"))
    run(*experiment('axis("max_tokens", [8, 9])', workdir="b"))
    assert not list(beside.tables(Results.read([tmp_path / "a", tmp_path / "b"])))


def test_lines_that_coincide_are_both_seen(two: Results) -> None:
    (picture,) = plots.pictures(two)
    panel, *_ = picture.figure.axes
    first, second = (container.lines[0] for container in panel.containers)
    assert first.get_linewidth() > second.get_linewidth() + 1
    assert first.get_markersize() > second.get_markersize() + 1


def test_a_field_that_is_younger_than_records_has_its_default(two: Results) -> None:
    path = two.contents[0].path / "config.json"
    config = json.loads(path.read_text())
    del config["config"]["experiment.judge.words"]
    path.write_text(json.dumps(config))
    again = Results.read([content.path for content in two.contents])
    assert "experiment.judge.words" not in again.rows[0].overrides


def test_what_differs_between_environments_stands_beside_each_other(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    run(*experiment())
    w = tmp_path / "w"
    (one,) = (w / "environments").iterdir()
    other = json.loads(one.read_text()) | {"host": "elsewhere", "cores": 4096}
    (w / "environments" / "abcdef01.json").write_text(json.dumps(other))
    events = lines(w / "metrics.jsonl")
    events.append(events[0] | {"environment": "abcdef01"})
    (w / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert run("report", str(w)).code == 0
    page = Opened((w / "report.html").read_text())
    assert ["field", "w, 1", "w, 2"] in page.headers
    for words in ("What differs between 2 environments", "elsewhere", "4096", "What is the same"):
        assert words in page.text
