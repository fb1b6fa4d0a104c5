"""A model judges answers, and says how likely it finds one that is given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_jax import api
from qwen_jax.experiments import judging
from tests.experiments.conftest import lines

pytestmark = pytest.mark.usefixtures("loaded")
WORDS = ("snow", "fern", "crow")
TEMPLATE = "{word}? {text} ({prompt})"


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "words.jsonl"
    held = ({"id": w, "word": w, "answer": f"{w} at last"} for w in WORDS)
    path.write_text("".join(json.dumps(line) + "\n" for line in held))
    return str(path)


def config(words: str, judge: str = "") -> str:
    return (
        f"config.prompt_file = {words!r}; config.experiment.template = 'haiku: {{word}}'; "
        "config.experiment.task = 'generate'; config.n = 2; config.batch_invariant = False; "
        f"config.max_tokens = 12; {judge}"
    )


JUDGE = (
    "config.experiment.scores = ('judge', 'length'); "
    f"config.experiment.judge.template = {TEMPLATE!r}"
)


def probability(model: api.Model, prompt: str) -> float:
    """By the whole logits, of the two words' tokens one after another."""
    context, found = model.request(prompt).tokens, []
    for word in ("yes", "no"):
        ids = model.tokenizer.encode(word)
        logits = model.logits([*context, *ids]).astype(np.float64)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        found.append(sum(logits[len(context) + i - 1, token] for i, token in enumerate(ids)))
    return 1 / (1 + math.exp(found[1] - found[0]))


def test_answers_are_judged_when_all_are_there(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    model: api.Model,
    words: str,
) -> None:
    argv = experiment('axis("sampling.temperature", [0.7, 1.5])', config(words, JUDGE))
    assert run(*argv, "--metric=judge").out.startswith("On judge ")
    w = tmp_path / "w"
    found = lines(w / "judgements.jsonl")
    outputs = {(line["point"], line["row"]): line for line in lines(w / "outputs.jsonl")}
    assert {(line["point"], line["row"]) for line in found} == outputs.keys()
    for line in found:
        answer = outputs[line["point"], line["row"]]
        word = answer["id"]
        assert line["asked"] == f"{word}? {answer['text']} (haiku: {word})"
    assert found[0]["judge"] == pytest.approx(probability(model, found[0]["asked"]), rel=1e-4)
    events = lines(w / "metrics.jsonl")
    (first, _) = (event for event in events if event["event"] == "scored")
    mean = np.mean([line["judge"] for line in found if line["point"] == first["point"]])
    assert first["metrics"]["judge"] == pytest.approx(mean)
    # Cut anywhere, only what is missing is judged, and all comes out the same.
    whole = (w / "judgements.jsonl").read_bytes()
    (w / "judgements.jsonl").write_bytes(whole[: len(whole) // 2])
    kept = [json.dumps(event) + "\n" for event in events if event["event"] != "scored"]
    (w / "metrics.jsonl").write_text("".join(kept))
    assert run(*argv).code == 0
    again = [event for event in lines(w / "metrics.jsonl") if event["event"] == "scored"]
    for event in again:
        (before,) = (e for e in events if e["event"] == "scored" and e["point"] == event["point"])
        assert event["metrics"] == pytest.approx(before["metrics"])
    assert len(lines(w / "judgements.jsonl")) == len(found)


def test_the_judge_is_another_model(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path, words: str
) -> None:
    """Of other weights, which are loaded when all answers are there."""
    quantised = f"{JUDGE}; config.experiment.judge.quantization = 'Q4_0'"
    argv = experiment("[{}]", config(words, quantised))
    assert run(*argv).code == 0
    assert len(lines(tmp_path / "w" / "judgements.jsonl")) == 6
    assert list((tmp_path / "w").rglob("*.gguf"))


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("config.experiment.scores = ('judge',)", "asks by experiment.judge.template"),
        (JUDGE.replace("{text}", "text"), "has no {text}, where the answer goes"),
        (JUDGE.replace("{word}", "{wrod}"), "has no 'wrod', which experiment.judge.template asks"),
        (JUDGE.replace("{word}", "{"), "experiment.judge.template can't be filled"),
        (f"{JUDGE}; config.experiment.judge.words = ('a', 'a')", "must be two words"),
        (f"{JUDGE}; config.experiment.judge.dtype = 'float8'", "experiment.judge: dtype is"),
        (
            "config.experiment.judge.template = '{text}'",
            "experiment.judge.template does nothing without the score judge",
        ),
    ],
)
def test_refused_before_anything_runs(
    experiment: Callable[..., list[str]],
    refuses: Callable[..., None],
    words: str,
    judge: str,
    said: str,
) -> None:
    refuses(experiment("[{}]", config(words, judge)), said)


def test_a_judge_that_fails_is_told_of_and_tried_again(
    experiment: Callable[..., list[str]],
    run: Callable,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    argv, real = experiment("[{}]", config(words, JUDGE)), judging.judged
    monkeypatch.setattr(judging, "judged", lambda *args: 1 / 0)
    assert run(*argv).code == 1 and "are not judged: ZeroDivisionError" in caplog.text
    monkeypatch.setattr(judging, "judged", real)
    assert run(*argv).code == 0


def test_how_likely_given_answers_are(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    model: api.Model,
    words: str,
) -> None:
    likely = (
        f"config.prompt_file = {words!r}; config.experiment.task = 'likelihood'; "
        "config.batch_invariant = False; "
        "config.experiment.template = 'haiku: {word}'"
    )
    argv = experiment('axis("raw", [False, True])', likely)
    assert run(*argv).code == 0
    w = tmp_path / "w"
    found = lines(w / "outputs.jsonl")
    for line, raw in ((found[0], False), (found[3], True)):
        context = model.request("haiku: snow", raw=raw).tokens
        ids = model.tokenizer.encode("snow at last")
        logits = model.logits([*context, *ids]).astype(np.float64)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = [logits[len(context) + i - 1, token] for i, token in enumerate(ids)]
        assert line["logprobs"] == pytest.approx(expected, abs=1e-4)
    events = {e["point"]: e for e in lines(w / "metrics.jsonl") if e["event"] == "finished"}
    metrics = events[found[0]["point"]]["metrics"]
    means = [np.mean(line["logprobs"]) for line in found[:3]]
    assert metrics["answer_logprob"] == pytest.approx(np.mean(means))
    every = np.concatenate([line["logprobs"] for line in found[:3]])
    assert metrics["answer_perplexity"] == pytest.approx(np.exp(-every.mean()))
    # A cut record goes on where it was.
    text = (w / "outputs.jsonl").read_text()
    (w / "outputs.jsonl").write_text(text[: len(text) // 3])
    events_left = [e for e in lines(w / "metrics.jsonl") if e["event"] == "session"]
    (w / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events_left))
    assert run(*argv).code == 0
    assert (w / "outputs.jsonl").read_text() == text
