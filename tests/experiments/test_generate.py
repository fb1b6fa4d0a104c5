"""The task `generate`: answers, scores, and going on in the midst of a point."""

import collections
import json
import math
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qwen_jax import api
from qwen_jax.completions import Timings
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.experiments.scores import answers, texts
from qwen_jax.experiments.scores.fields import Score
from qwen_jax.experiments.tasks.generate import Tally
from qwen_jax.prompts import Item
from tests.experiments.conftest import lines

pytestmark = pytest.mark.usefixtures("loaded")
WORDS = ["river", "lantern", "snow", "fern", "crow", "moss", "tide"]
TEMPLATE = "haiku: {word}"


@pytest.fixture
def haiku(experiment: Callable[..., list[str]], tmp_path: Path) -> list[str]:
    """Seven words, two samples each, in four slots."""
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"id": w, "word": w}) + "\n" for w in WORDS))
    return experiment(
        'axis("sampling.temperature", [0.7])',
        f"config.prompt_file = {str(path)!r}; config.experiment.template = {TEMPLATE!r}; "
        "config.experiment.task = 'generate'; config.experiment.scores = ('haiku', 'diversity'); "
        "config.n = 2; config.slots = 4; config.max_tokens = 40",
    )


def test_answers_and_scores(
    haiku: list[str], run: Callable, tmp_path: Path, model: api.Model
) -> None:
    assert run(*haiku).code == 0
    outputs = lines(tmp_path / "w" / "outputs.jsonl")
    came = {(o["id"], o["sample"]): o["text"] for o in outputs}
    expected = []
    for word in WORDS:
        warm = Sampling(temperature=0.7, seed=zlib.crc32(word.encode()))  # of the line's id
        made = model.generate(TEMPLATE.format(word=word), n=2, sampling=warm, max_tokens=40)
        assert isinstance(made, list)
        expected += made
    keys = [(word, sample) for word in WORDS for sample in range(2)]
    assert came == dict(zip(keys, (c.text for c in expected), strict=True))
    (event,) = (e for e in lines(tmp_path / "w" / "metrics.jsonl") if e["event"] == "finished")
    metrics = event["metrics"]
    good = [w in came[w, s].lower() and came[w, s].count("\n") == 2 for w, s in keys]
    assert metrics["haiku"] == pytest.approx(sum(good) / 14)
    different = [len({came[word, 0], came[word, 1]}) / 2 for word in WORDS]
    assert metrics["different_texts"] == pytest.approx(sum(different) / 7)
    tokens = [len(c.tokens) for c in expected]
    assert metrics["tokens_per_answer"] == pytest.approx(sum(tokens) / 14)


def test_a_prompt_that_fails_is_named(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    """It ends its point, whose means would leave it out."""
    path = tmp_path / "words.jsonl"
    banned = {"logit_bias": {str(token): -math.inf for token in range(2048)}}
    path.write_text("".join(json.dumps({"prompt": "a"} | more) + "\n" for more in ({}, banned)))
    argv = experiment(
        'axis("sampling.temperature", [0.7])',
        f"config.prompt_file = {str(path)!r}; config.experiment.task = 'generate'",
    )
    assert run(*argv).code != 0
    (event,) = (e for e in lines(tmp_path / "w" / "metrics.jsonl") if e["event"] == "failed")
    assert event["reason"].startswith(f"{path}, line 2: sampling.logit_bias bans every token")


def test_cut_anywhere_it_goes_on_with_the_same_answers(
    haiku: list[str], run: Callable, tmp_path: Path
) -> None:
    run(*haiku)
    w = tmp_path / "w"
    outputs, events = ((w / name).read_bytes() for name in ("outputs.jsonl", "metrics.jsonl"))
    whole = {(o["id"], o["sample"]): o for o in lines(w / "outputs.jsonl")}
    metrics = lines(w / "metrics.jsonl")[-1]["metrics"]
    begun = b"".join(line for line in events.splitlines(True) if b"finished" not in line)
    rng = random.Random(1)
    for cut in [0, *rng.sample(range(len(outputs)), 4), len(outputs)]:
        (w / "outputs.jsonl").write_bytes(outputs[:cut])
        (w / "metrics.jsonl").write_bytes(begun)
        assert run(*haiku).code == 0
        again = lines(w / "outputs.jsonl")
        counts = collections.Counter((o["id"], o["sample"]) for o in again)
        assert counts == dict.fromkeys(whole, 1)
        assert {(o["id"], o["sample"]): o for o in again} == whole
        now = lines(w / "metrics.jsonl")[-1]["metrics"]
        steady = [name for name in metrics if "per_s" not in name and name != "model_seconds"]
        assert [now[name] for name in steady] == [metrics[name] for name in steady]


def tally(n: int = 1, score: Score = texts.diversity) -> Tally:
    task = SimpleNamespace(config=SimpleNamespace(n=n), scores=[score])
    return Tally(task, lambda *scored: None)  # type: ignore[arg-type]


def test_speeds_are_those_of_stretches_that_compile_nothing() -> None:
    sums = tally()
    answer = {"tokens": [1, 2], "text": "a b", "finish_reason": "stop"}
    sums.add(0, 0, Item("x", {}, "here"), answer)
    sums.time(Timings(generated_tokens=5, seconds=1.001, compile_seconds=2.0))
    assert "tokens_per_s" not in sums.metrics()
    sums.time(Timings(generated_tokens=55, seconds=6.001, compile_seconds=2.0))
    sums.time(Timings(generated_tokens=56, seconds=7.001, compile_seconds=2.5))
    metrics = sums.metrics()
    assert metrics["tokens_per_s"] == 10
    assert metrics["model_seconds"] == pytest.approx(7.001)


def test_the_order_of_answers_changes_no_metric() -> None:
    rng, n, item = random.Random(5), 3, Item("x", {}, "here")
    given = [
        {"tokens": [0], "finish_reason": "stop", "text": " ".join(rng.choices("abcdefg", k=9))}
        for _ in range(60)
    ]
    found = []
    for _ in range(5):
        sums, rows = tally(n), list(enumerate(given))
        rng.shuffle(rows)
        for row, answer in rows:
            sums.add(row, row % n, item, answer)
        found.append(sums.metrics())
    assert all(metrics == found[0] for metrics in found)
    each = [texts.diversity(item, given[i : i + n]) for i in range(0, 60, n)]
    for name in each[0]:
        values = [one[name] for one in each]
        assert found[0][name] == pytest.approx(np.mean(values))
        assert found[0][f"{name}_error"] == pytest.approx(np.std(values, ddof=1) / 20**0.5)


def test_a_score_that_is_no_number(caplog: pytest.LogCaptureFixture) -> None:
    sums = tally(score=lambda item, samples: {"odd": float("nan")})
    with pytest.raises(UserError, match="here: the score odd is nan, not finite"):
        sums.add(0, 0, Item("x", {}, "here"), {"tokens": [], "finish_reason": "stop", "text": ""})


def test_samples_of_a_lines_own_are_judged_together() -> None:
    """Each prompt counts once, however many samples it has."""
    sums = tally(n=2, score=lambda item, samples: {"samples": len(samples)})
    answer = {"tokens": [], "finish_reason": "stop", "text": ""}
    for row, (sample, own) in enumerate([(0, {}), (1, {}), (0, {"n": 3}), (1, {"n": 3})]):
        sums.add(row, sample, Item("x", {}, "here", own=own), answer)
    sums.add(4, 2, Item("x", {}, "here", own={"n": 3}), answer)
    metrics = sums.metrics()
    assert (metrics["samples"], metrics["prompts"]) == (2.5, 2)


def test_answers_are_the_same_whatever_the_slots(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"id": w, "word": w}) + "\n" for w in WORDS))
    argv = experiment(
        'axis("slots", [1, 3, 14])',
        f"config.prompt_file = {str(path)!r}; config.experiment.template = {TEMPLATE!r}; "
        "config.n = 2; config.max_tokens = 12; config.sampling.temperature = 0.9",
    )
    assert run(*argv, "--config.experiment.task=generate").code == 0
    points: dict[str, dict] = collections.defaultdict(dict)
    for line in lines(tmp_path / "w" / "outputs.jsonl"):
        points[line["point"]][line["row"]] = line["text"]
    one, *others = points.values()
    assert len(one) == 14 and others == [one, one]


def test_diversity_by_hand() -> None:
    samples = [{"text": "a b a"}, {"text": "A b c"}, {"text": "a b a"}]
    found = texts.diversity(Item("x", {}, "here"), samples)
    # Nine words, three of them different; six pairs: ab ba ab bc ab ba.
    assert found == {"different_texts": 2 / 3, "distinct_1": 3 / 9, "distinct_2": 3 / 6}


def test_match_by_hand() -> None:
    item = Item("x", {}, "here", fields={"answer": "Four"})
    assert answers.match(item, [{"text": " four\n"}, {"text": "five"}]) == {"match": 0.5}
    with pytest.raises(UserError, match="has no field 'answer'"):
        answers.match(Item("x", {}, "here"), [{"text": "four"}])
