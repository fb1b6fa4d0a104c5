"""The task `generate`: answers, scores, and going on in the midst of a batch."""

import collections
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen_jax import api
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.experiments import scores
from qwen_jax.experiments.tasks.generate import _Tally
from qwen_jax.generation import Timings
from qwen_jax.prompts import Item
from tests.experiments.conftest import lines

pytestmark = pytest.mark.usefixtures("loaded")
WORDS = ["river", "lantern", "snow", "fern", "crow", "moss", "tide"]
TEMPLATE = "haiku: {word}"


@pytest.fixture
def haiku(experiment: Callable[..., list[str]], tmp_path: Path) -> list[str]:
    """Seven words, two samples each, in batches of four: the last one is padded."""
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"id": w, "word": w}) + "\n" for w in WORDS))
    return experiment(
        'axis("sampling.temperature", [0.7])',
        f"config.prompt_file = {str(path)!r}; config.experiment.template = {TEMPLATE!r}; "
        "config.experiment.task = 'generate'; config.experiment.scores = ('haiku', 'diversity'); "
        "config.n = 2; config.batch_size = 4; config.max_tokens = 40",
    )


def test_answers_and_scores(
    haiku: list[str], run: Callable, tmp_path: Path, model: api.Model
) -> None:
    assert run(*haiku).code == 0
    outputs = lines(tmp_path / "w" / "outputs.jsonl")
    texts = {(o["id"], o["sample"]): o["text"] for o in outputs}
    expected = model.generate(
        [TEMPLATE.format(word=word) for word in WORDS],
        n=2,
        sampling=Sampling(temperature=0.7),
        max_tokens=40,
    )
    assert isinstance(expected, list)
    keys = [(word, sample) for word in WORDS for sample in range(2)]
    assert texts == dict(zip(keys, (c.text for c in expected), strict=True))
    (event,) = (e for e in lines(tmp_path / "w" / "metrics.jsonl") if e["event"] == "finished")
    metrics = event["metrics"]
    good = [w in texts[w, s].lower() and texts[w, s].count("\n") == 2 for w, s in keys]
    assert metrics["haiku"] == pytest.approx(sum(good) / 14)
    different = [len({texts[word, 0], texts[word, 1]}) / 2 for word in WORDS]
    assert metrics["different_texts"] == pytest.approx(sum(different) / 7)
    tokens = [len(c.tokens) for c in expected]
    assert metrics["tokens_per_answer"] == pytest.approx(sum(tokens) / 14)


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


def test_a_bad_prompt_fails_its_point_alone(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"prompt": "haiku: snow"}\n')
    bad.write_text('{"prompt": "haiku: snow"}\n{"promt": "haiku: rain"}\n')
    sweep = f'axis("prompt_file", [{str(bad)!r}, {str(good)!r}])'
    setting = "config.experiment.task = 'generate'; config.max_tokens = 2; config.batch_size = 1"
    result = run(*experiment(sweep, setting))
    assert result.code == 1 and "1 finished, 1 failed." in result.out
    assert "bad.jsonl, line 2 must have either 'prompt' or 'messages'" in result.out


@pytest.mark.parametrize(
    ("line", "template", "words"),
    [
        ('{"wrd": "x"}', "haiku: {word}", "has no 'word', which the template asks for"),
        ('{"word": "x"}', "haiku: {word", "can't be filled"),
        ('{"word": "x"}', "haiku: {word.shape}", "can't be filled"),
        ('{"messages": []}', "haiku: {word}", "has 'messages', which a template can't fill"),
    ],
)
def test_templates_that_cannot_be_filled(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    line: str,
    template: str,
    words: str,
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n")
    argv = experiment(
        f'axis("prompt_file", [{str(path)!r}])',
        f"config.experiment.task = 'generate'; config.experiment.template = {template!r}",
    )
    result = run(*argv)
    assert result.code == 1 and words in result.out


def test_speeds_are_those_of_batches_that_compile_nothing() -> None:
    tally = _Tally(SimpleNamespace(config=SimpleNamespace(n=1), scores=[]))  # type: ignore[arg-type]
    tally.add([(Item("x", {}, "here"), {"tokens": [1, 2], "finish_reason": "stop"})])
    tally.time(Timings(10, 0.001, 5, 1.0, 2.001, compile_seconds=2.0))
    assert tally.metrics().keys() & {"prompt_tokens_per_s", "tokens_per_s"} == set()
    tally.time(Timings(100, 2.0, 50, 5.0, 2.0, compile_seconds=0.0))
    metrics = tally.metrics()
    assert (metrics["prompt_tokens_per_s"], metrics["tokens_per_s"]) == (50, 10)
    assert metrics["model_seconds"] == pytest.approx(8.001)


def test_diversity_by_hand() -> None:
    samples = [{"text": "a b a"}, {"text": "A b c"}, {"text": "a b a"}]
    found = scores.diversity(Item("x", {}, "here"), samples)
    # Nine words, three of them different; six pairs: ab ba ab bc ab ba.
    assert found == {"different_texts": 2 / 3, "distinct_1": 3 / 9, "distinct_2": 3 / 6}


def test_match_by_hand() -> None:
    item = Item("x", {}, "here", fields={"answer": "Four"})
    assert scores.match(item, [{"text": " four\n"}, {"text": "five"}]) == {"match": 0.5}
    with pytest.raises(UserError, match="has no field 'answer'"):
        scores.match(Item("x", {}, "here"), [{"text": "four"}])
