"""lm-evaluation-harness, which asks the server, gets the figures of the direct way.

Needs the extras `eval` and `parity`, so it runs in `make parity`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs pip install '.[eval]'")
pytest.importorskip("tenacity", reason="needs pip install '.[parity]'")

import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

import qwen_jax
from qwen_jax.experiments.harness import Harness
from tests.serving.conftest import Served

pytestmark = pytest.mark.live

Both = tuple[Harness, LocalCompletionsAPI]
TASK = """task: {kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
KINDS = {
    "multiple_choice": """doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
""",
    "loglikelihood": """doc_to_target: " moon"
metric_list:
  - metric: perplexity
""",
    "loglikelihood_rolling": """doc_to_target: "{{question}} at dawn, a crow on the old wall"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "generate_until": """doc_to_target: "the first snow"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
""",
}
QUESTIONS = [
    {"question": f"haiku: {a}", "choices": [a, b], "label": i % 2}
    for i, (a, b) in enumerate([("snow", "rain"), ("crow", "fern"), ("tide", "moss")])
]


@pytest.fixture(scope="module", params=[1, 4], ids=["one by one", "four at once"])
def both(haiku: Served, model: qwen_jax.Model, request: pytest.FixtureRequest) -> Iterator[Both]:
    """The model itself, and one that asks the server, tokens included."""
    context = model.config.context_length
    url = f"{haiku.url}/v1/completions"
    over = LocalCompletionsAPI(url, model="haiku", max_length=context, num_concurrent=request.param)
    assert over.tokenizer_backend == "remote"
    yield Harness(model), over
    haiku.settle()


PAIRS = [
    ("haiku: snow", " the"),
    ("", "the snow at daybreak"),
    ("haiku: snow\n", "the snow at daybreak\na sparrow signs the garden"),
    ("a<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    ("Äpfel 我想在", " apple"),
]


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, 0) for given in arguments]


def test_how_likely_texts_are(both: Both, model: qwen_jax.Model) -> None:
    texts = ["haiku: snow", "the snow", "an old silent", "a crow on the old"]
    own = [model.generate(text, raw=True, max_tokens=2).text for text in texts]
    likeliest = [pair for pair in zip(texts, own, strict=True) if pair[1]]
    asked = instances("loglikelihood", *PAIRS, *likeliest)
    ours, theirs = (m.loglikelihood(asked, disable_tqdm=True) for m in both)
    np.testing.assert_allclose([p for p, _ in theirs], [p for p, _ in ours], rtol=1e-5)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]
    assert {greedy for _, greedy in ours} == {True, False}


def test_what_is_written(both: Both) -> None:
    settings: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 12}
    texts = ("haiku: snow", "haiku: rust\n", "an old silent")
    asked = instances("generate_until", *((text, dict(settings)) for text in texts))
    ours, theirs = (m.generate_until(asked, disable_tqdm=True) for m in both)
    assert theirs == ours and len(set(ours)) == len(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_figures(both: Both, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole tasks, as `lm_eval` computes them."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "task.yaml").write_text(TASK.format(kind=kind, data=data) + KINDS[kind])
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    ours, theirs = (
        lm_eval.simple_evaluate(m, tasks=[kind], task_manager=manager, bootstrap_iters=0)
        for m in both
    )
    for name, value in ours["results"][kind].items():
        if isinstance(value, float):
            assert theirs["results"][kind][name] == pytest.approx(value, rel=1e-5)
