"""The page's view of answers: its data, its pages, and what a browser makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_jax.experiments.report import texts
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.task import Work
from tests.experiments.fake import Count
from tests.reporting.opened import Opened
from tests.reporting.test_in_a_browser import BROWSER, shown

pytest.importorskip("matplotlib")
HOSTILE = "</script><script>alert(1)</script><b>\u202e\x1b[2J"


@pytest.fixture
def answered(
    monkeypatch: pytest.MonkeyPatch, experiment: Callable[..., list[str]], run: Callable
) -> Callable[..., None]:
    """Runs an experiment whose task writes answers as `generate` does: 7 is right on even prompts,
    6 on all but the last."""

    def answered(prompts: int = 4, **answer: Any) -> None:
        def metrics(task: Count, work: Work) -> dict[str, float]:
            tokens = task.config.max_tokens
            right = [i % 2 == 0 if tokens == 7 else i < prompts - 1 for i in range(prompts)]
            for row, good in enumerate(right):
                text = f"{'yes' if good else 'no'} it is {row} by {tokens}"
                item = {"text": text, "finish_reason": "stop"} | answer
                work.record(row=row, id=f"p{row}", sample=0, **item)
                work.score("prompt", row, f"p{row}", {"right": float(good)})
            return {"right": sum(right) / prompts}

        monkeypatch.setattr(Count, "run", metrics)
        assert run(*experiment('axis("max_tokens", [6, 7, 8])')).code == 0

    return answered


def data(path: Path) -> dict[str, Any]:
    """What the viewer reads."""
    (held,) = re.findall(
        r'<script type="application/json" data-own>(.*?)</script>', path.read_text()
    )
    return json.loads(held)


def test_the_data(answered: Callable, tmp_path: Path) -> None:
    answered()
    found = data(tmp_path / "w" / "report.html")
    assert found["settings"] == ["max_tokens=6", "max_tokens=7", "max_tokens=8"]
    assert (found["metrics"], found["lower"]) == (["right"], [False])
    # First where settings differ, then in the file's order.
    assert [prompt["id"] for prompt in found["prompts"]] == ["p1", "p0", "p2", "p3"]
    first = found["prompts"][0]["of"]
    assert [one["scores"] for one in first] == [[1.0], [0.0], [1.0]]
    assert first[1]["answers"] == [["no it is 1 by 7", "stop"]]
    # The best and the worst stand beside each other at first.
    assert found["first"][1] == 1


def test_hostile_and_long_texts(answered: Callable, tmp_path: Path) -> None:
    answered(text=HOSTILE + "x" * 30_000)
    text = (tmp_path / "w" / "report.html").read_text("utf-8")
    assert not set("\u202e\x1b") & set(text) and "<script>alert" not in text
    assert text.count("<script") == text.count("data-own>") == 2
    held = data(tmp_path / "w" / "report.html")["prompts"][0]["of"][0]["answers"][0][0]
    assert held.startswith("</script><script>alert(1)</script><b>\\u202e\\x1b[2J")
    assert len(held) < texts.LONGEST + 50 and "more letters" in held


def test_log_probabilities_go_with_their_tokens(answered: Callable, tmp_path: Path) -> None:
    entries = [{"token": 1, "logprob": -0.12345, "top": []}, {"token": 2, "logprob": -3.0}]
    answered(logprobs=entries, pieces=["a", "<b>"])
    one = data(tmp_path / "w" / "report.html")["prompts"][0]["of"][0]["answers"][0]
    assert one[2] == [["a", -0.123], ["<b>", -3.0]]


def test_many_answers_are_pages(
    answered: Callable, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "PAGE", 2000)
    answered(prompts=24)
    w = tmp_path / "w"
    pages = [w / "report.html", *sorted(w.glob("report-*.html"), key=lambda p: (len(p.name), p))]
    assert len(pages) > 2 and all(page.stat().st_size < 60_000 for page in pages[1:])
    held = [prompt["id"] for page in pages for prompt in data(page)["prompts"]]
    assert sorted(held) == sorted(f"p{i}" for i in range(24))
    for page in pages:
        named = Opened(page.read_text()).addresses
        assert {w / name for name in named} == {*pages} - {page}
    # Beyond a number of answers the records alone have them.
    monkeypatch.setattr(texts, "MOST", 10)
    assert run("report", str(w)).code == 0
    assert "62 answers are in outputs.jsonl alone." in (w / "report.html").read_text()


def test_prompts_are_shown_while_their_file_is_as_it_was(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path, loaded: object
) -> None:
    words = tmp_path / "words.jsonl"
    words.write_text('{"id": "a", "word": "snow"}\n')
    argv = experiment(
        'axis("sampling.seed", [0, 1])',
        f"config.prompt_file = {str(words)!r}; config.experiment.template = 'On {{word}}?'; "
        "config.experiment.task = 'generate'; config.max_tokens = 3; config.top_logprobs = 0; "
        "config.batch_invariant = False; config.sampling.temperature = 1.0",
    )
    run(*argv)
    (prompt,) = data(tmp_path / "w" / "report.html")["prompts"]
    assert (prompt["id"], prompt["asked"]) == ("a", "On snow?")
    assert [one["seed"] for one in prompt["of"]] == [0, 1]
    for one in prompt["of"]:
        text, _, pieces = one["answers"][0]
        assert "".join(piece for piece, _ in pieces) == text and all(p < 0 for _, p in pieces)
    words.write_text('{"id": "a", "word": "ice"}\n')
    run("report", str(tmp_path / "w"))
    (prompt,) = data(tmp_path / "w" / "report.html")["prompts"]
    assert prompt["asked"] == "" and prompt["of"][1]["answers"][0][0] == text


def test_tasks_without_answers_have_no_texts(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    run(*experiment())
    assert texts.answers(Results.read([tmp_path / "w"]), "report") is None
    assert '<script type="application' not in (tmp_path / "w" / "report.html").read_text()


@pytest.mark.live
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_a_browser_shows_where_one_is_right_and_the_other_wrong(
    answered: Callable, tmp_path: Path
) -> None:
    answered(prompts=6)
    page = tmp_path / "w" / "report.html"
    whole = shown(page, "")
    assert "6 of 6 prompts" in whole and "<mark>6</mark>" in whole
    chosen = (
        "const [a, b, s, w] = document.querySelectorAll('.texts select');"
        "a.value = 0; b.value = 1; w.value = 'a'; w.dispatchEvent(new Event('change'));"
    )
    dom = shown(page, chosen)
    assert re.findall(r"<h3>(\w+)</h3>", dom) == ["p1", "p3"]
    assert '<span class="score up">right 1</span>' in dom
    typed = (
        "const i = document.querySelector('.texts input'); i.value = 'is 3 BY';"
        "i.dispatchEvent(new Event('input'));"
    )
    assert re.findall(r"<h3>(\w+)</h3>", shown(page, typed)) == ["p3"]


@pytest.mark.live
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_a_browser_takes_hostile_texts_as_texts(answered: Callable, tmp_path: Path) -> None:
    answered(text=HOSTILE + "<img src=x onerror=document.title='owned'>")
    dom = shown(tmp_path / "w" / "report.html", "")
    assert "<title>owned" not in dom and "<img" not in dom
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in dom
