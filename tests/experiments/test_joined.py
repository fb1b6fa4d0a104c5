"""Several tasks at one point: one row of all their metrics, and records that stay apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax.experiments import load_results
from qwen_jax.experiments.report.results import Results
from tests.experiments.conftest import lines

CONFIG = (
    "config.experiment.task = 'compare+generate'; config.experiment.text = {text!r}; "
    "config.experiment.context = 64; config.experiment.reference.quantization = 'F32'; "
    "config.prompt_file = {words!r}; config.experiment.template = 'haiku: {{word}}'; "
    "config.experiment.scores = ('haiku',)"
)
SWEEP = 'axis("max_tokens", [3, 40])'


@pytest.fixture
def fields(tmp_path: Path) -> str:
    text, words = tmp_path / "text.txt", tmp_path / "words.jsonl"
    text.write_text("the moon over the river, and a lantern in the snow; " * 16)
    words.write_text("".join(json.dumps({"id": w, "word": w}) + "\n" for w in ("snow", "fern")))
    return CONFIG.format(text=str(text), words=str(words))


@pytest.mark.usefixtures("loaded")
def test_compare_and_generate(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path, fields: str
) -> None:
    argv, w = experiment(SWEEP, fields), tmp_path / "w"
    result = run(*argv)
    assert result.code == 0 and result.out.startswith("On kld both settings have the same mean")
    rows = load_results(w)
    assert [row["haiku"] for row in rows] == [0, 1] and rows[0]["kld"] == rows[1]["kld"] < 1e-6
    items = lines(w / "outputs.jsonl")
    assert [i["task"] for i in items if i["point"] == items[0]["point"]].count("generate") == 2
    # Each metric is paired by units of its own.
    assert "paired by window" in " ".join(result.out.split())
    asked = " ".join(run("report", str(w), "--metric=haiku").out.split())
    assert asked.startswith("On haiku ") and "paired by prompt" in asked
    kinds = Results.read([w]).settings[0].points[0].scored.of
    assert kinds["kld"] == "window" and kinds["haiku"] == "prompt"
    page = (w / "report.html").read_text()
    assert "haiku: snow" in page and '"metrics":["haiku","has_word","three_lines"]' in page
    # A cut record goes on, and the answers can be judged again by themselves.
    whole = {row["point"]: {k: row[k] for k in ("kld", "haiku", "three_lines")} for row in rows}
    (w / "outputs.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items[:3]))
    events = [e for e in lines(w / "metrics.jsonl") if e["event"] == "session"]
    (w / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert run(*argv).code == 0
    again = {row["point"]: row for row in load_results(w)}
    for point, values in whole.items():
        assert {name: again[point][name] for name in values} == pytest.approx(values)
    assert run("score", str(w), "--scores=length", "--metric=lines").out.startswith("On lines ")
    assert len([s for s in lines(w / "scores.jsonl") if s["of"] == "window"]) > 4


@pytest.mark.parametrize(
    ("task", "more", "words"),
    [
        ("generate+generate", "", "is 'generate+generate', but a task can be named once"),
        ("generate+serve", "", "more than one of them measures joules_per_token"),
        ("generate+genrate", "", "names 'genrate', which is none of generate, perplexity"),
        ("generate+", "", "names '', which is none of generate"),
        (
            "bench+generate",
            "config.experiment.scores = ('judge',); config.experiment.judge.template = '{text}'",
            "but the score judge needs the task generate by itself",
        ),
    ],
)
def test_refused(
    experiment: Callable[..., list[str]],
    refuses: Callable[..., None],
    task: str,
    more: str,
    words: str,
) -> None:
    fields = f"config.experiment.task = {task!r}; config.prompt = 'haiku: snow'; {more or 'pass'}"
    refuses(experiment('axis("slots", [1, 2])', fields), words)
