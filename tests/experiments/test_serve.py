"""The task `serve`: who waits for how long, by hand and through the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_jax import api
from qwen_jax.experiments.tasks.serve import Serve, Served, served
from qwen_jax.generation import NotYet
from qwen_jax.settings import get_config
from tests.experiments.conftest import lines


def task(**fields: object) -> Serve:
    config = get_config()
    config.experiment.task = "serve"
    config.prompt = "haiku: snow"
    config.update_from_flattened_dict({f"experiment.serve.{k}": v for k, v in fields.items()})
    return Serve(config)


def test_figures_by_hand() -> None:
    one = Served([0.0, 1.0, 2.0, 2.0], [0.5, 1.1, 4.0, 2.2], [1.5, 1.5, 5.0, 2.2], [11, 5, 11, 1])
    found = task(good_ttft_ms=600.0, good_tpot_ms=100.0)._figures(one)
    # Times to first token are 500, 100, 2000 and 200 ms; per token after it 100, 100 and 100.
    assert found["ttft_p50_ms"] == pytest.approx(350) and found["ttft_p99_ms"] > 1900
    assert found["tpot_p50_ms"] == found["tpot_p99_ms"] == pytest.approx(100)
    assert found["latency_p90_ms"] == pytest.approx(np.percentile([1500, 500, 3000, 200], 90))
    # From the first arrival to the last end it took 5 s; the third came too late.
    assert found["good_share"] == 0.75 and found["good_per_s"] == pytest.approx(0.6)
    assert found["tokens_per_s"] == pytest.approx(28 / 5)


def test_requests_arrive_as_a_poisson_process() -> None:
    arrivals = task(rate=50.0, requests=4000)._arrivals(0)
    assert arrivals is not None
    gaps = np.diff([0.0, *arrivals])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)
    assert task(rate=50.0)._arrivals(1)[:2] != task(rate=50.0)._arrivals(0)[:2]  # type: ignore[index]
    assert task()._arrivals(0) is None


@pytest.mark.usefixtures("loaded")
def test_no_more_are_under_way_than_may_be(model: api.Model) -> None:
    prompts = [f"haiku: {word}" for word in ("snow", "fern", "crow")]
    requests = [model.request(prompt, max_tokens=12) for prompt in prompts] * 3
    one = served(model, requests, None, 2)
    alone = [len(c.tokens) for c in model.generate(prompts, max_tokens=12)]
    assert one.tokens == alone * 3
    for arrived, first, ended in zip(*one[:3], strict=True):
        assert arrived <= first <= ended
    for now in one.arrived:
        under_way = [a <= now < e for a, e in zip(one.arrived, one.ended, strict=True)]
        assert sum(under_way) <= 2
    late = served(model, requests[:2], [0.0, 0.3], 8)
    assert late.arrived == [0.0, 0.3] and late.first[1] >= 0.3


@pytest.mark.usefixtures("loaded")
def test_what_has_not_arrived_holds_nobody_up(model: api.Model) -> None:
    request = model.request("haiku: snow", max_tokens=12)
    given = iter([request, NotYet(), NotYet(), request])
    ended = {n: c.text for n, _, c in model.run(given) if c is not None}
    alone = model.generate("haiku: snow", max_tokens=12)
    assert ended == {0: alone.text, 3: alone.text}


@pytest.mark.usefixtures("loaded")
def test_the_whole_task(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    argv = experiment(
        'axis("experiment.serve.concurrency", [1, 4])',
        "config.experiment.task = 'serve'; config.prompt = 'haiku: snow'; config.max_tokens = 8; "
        "config.experiment.serve.requests = 6; config.experiment.serve.repeats = 2; "
        "config.batch_invariant = False",
    )
    result = run(*argv)
    assert result.code == 0 and "On good_per_s" in result.out and "without pairs" in result.out
    w = tmp_path / "w"
    items = lines(w / "outputs.jsonl")
    assert [item["repeat"] for item in items] == [0, 1, 0, 1] and len(items[0]["tokens"]) == 6
    # A cut record goes on at the repeat that is missing.
    (w / "outputs.jsonl").write_text(json.dumps(items[0]) + "\n")
    events = [e for e in lines(w / "metrics.jsonl") if e["event"] == "session"]
    (w / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert run(*argv).code == 0
    again = lines(w / "outputs.jsonl")
    assert len(again) == 4 and again[0] == items[0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("config.experiment.serve.rate = 0.0", "experiment.serve.rate is 0, but it must be above"),
        ("config.experiment.serve.requests = 0", "experiment.serve.requests is 0, but it must"),
        ("config.n = 2", "n is 2, but serve answers each request once"),
    ],
)
def test_refused(
    experiment: Callable[..., list[str]], refuses: Callable[..., None], config: str, words: str
) -> None:
    refuses(experiment("[{}]", f"config.experiment.task = 'serve'; {config}"), words)
