"""lm-evaluation-harness over our model; skipped without the extra `eval`."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax

from qwen_jax import api
from qwen_jax.generation import Completion
from tests.experiments.conftest import lines

pytest.importorskip("lm_eval")
from qwen_jax.experiments.harness import Harness

YAML = """task: local_words
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""


def expected(model: api.Model, context: str, continuation: str) -> tuple[float, bool]:
    """Of the whole text in one go, in float64 by SciPy."""
    before, all_tokens = (model.tokenizer.encode(t) for t in (context, context + continuation))
    logprobs = log_softmax(model.logits(all_tokens).astype(np.float64), axis=-1)
    at = range(len(before) - 1, len(all_tokens) - 1)
    pairs = [(logprobs[i], all_tokens[i + 1]) for i in at]
    return sum(p[t] for p, t in pairs), all(p.argmax() == t for p, t in pairs)


def test_loglikelihood_and_generation(model: api.Model) -> None:
    kept: list[str] = []
    harness = Harness(model, 2, keep=lambda key, line: kept.append(key))
    pairs = [("the moon", " over the river"), ("haiku: snow", " again the snow")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    for (logprob, greedy), pair in zip(found, pairs, strict=True):
        wanted = expected(model, *pair)
        assert logprob == pytest.approx(wanted[0], rel=1e-5) and greedy == wanted[1]
    # The whole text, each token given all before it and the first given the end of a text.
    text = "the moon over the river"
    (rolled,) = harness.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
    tokens = [harness.prefix_token_id, *model.tokenizer.encode(text)]
    logprobs = log_softmax(model.logits(tokens).astype(np.float64), axis=-1)
    total = sum(logprobs[i, t] for i, t in enumerate(tokens[1:]))
    assert rolled == pytest.approx(total, rel=1e-5)

    until = {"until": ["\n"], "max_gen_toks": 20}
    (line,) = harness.generate_until([SimpleNamespace(args=("the moon", until))], True)
    whole = model.generate("the moon", raw=True, max_tokens=20)
    assert isinstance(whole, Completion) and line == whole.text.split("\n")[0]
    assert len(kept) == 4


@pytest.mark.usefixtures("loaded")
def test_a_task_from_a_local_file_and_its_resumption(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    model: api.Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = [
        {"question": f"haiku: {a}", "choices": [a, b], "label": i % 2}
        for i, (a, b) in enumerate([("snow", "rain"), ("crow", "fern"), ("tide", "moss")])
    ]
    data = folder / "words.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "words.yaml").write_text(YAML.format(data=data))
    argv = experiment(
        'axis("sampling.seed", [1])',
        "config.experiment.task = 'eval'; config.experiment.eval.tasks = ('local_words',); "
        f"config.experiment.eval.include = {str(folder)!r}",
    )
    assert run(*argv).code == 0
    right = [
        np.argmax([expected(model, q["question"], f" {c}")[0] for c in q["choices"]]) == q["label"]
        for q in questions
    ]
    w = tmp_path / "w"
    metrics = lines(w / "metrics.jsonl")[-1]["metrics"]
    assert metrics["local_words.acc"] == pytest.approx(np.mean(right))
    outputs = (w / "outputs.jsonl").read_text().splitlines(True)
    assert len(outputs) == 6
    (w / "outputs.jsonl").write_text("".join(outputs[:4]))
    events = (w / "metrics.jsonl").read_text().splitlines(True)
    (w / "metrics.jsonl").write_text("".join(e for e in events if "finished" not in e))
    assert run(*argv).code == 0
    assert (w / "outputs.jsonl").read_text().splitlines(True) == outputs
    assert lines(w / "metrics.jsonl")[-1]["metrics"] == metrics
