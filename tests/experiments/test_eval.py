"""Tasks of lm-evaluation-harness as experiments, and its command line with our model.

Needs the extra `eval`, so it runs in `make parity`.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax import api
from qwen_jax import lm_eval as command
from tests.cli.conftest import REPOSITORY
from tests.experiments.conftest import lines

pytest.importorskip("lm_eval", reason="needs pip install '.[eval]'")
import lm_eval.tasks

from tests.experiments.test_harness import expected

pytestmark = pytest.mark.live

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
GENERATION = """task: local_lines
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
gen_prefix: "the"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
  do_sample: false
repeats: 2
metric_list:
  - metric: exact_match
"""
SCORED = """task: local_scores
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " moon"
metric_list:
  - metric: perplexity
"""
QUESTIONS = [
    {"question": f"haiku: {a}", "choices": [a, b], "label": i % 2}
    for i, (a, b) in enumerate([("snow", "rain"), ("crow", "fern"), ("tide", "moss")])
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks, one of either kind, that need no network."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "words.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "words.yaml").write_text(YAML.format(data=data))
    (folder / "lines.yaml").write_text(GENERATION.format(data=data))
    (folder / "scores.yaml").write_text(SCORED.format(data=data))
    return folder


def evaluates(task: str, folder: Path, more: str = "") -> str:
    return (
        f"config.experiment.task = 'eval'; config.experiment.eval.tasks = ({task!r},); "
        f"config.experiment.eval.include = {str(folder)!r}; {more}"
    )


@pytest.mark.usefixtures("loaded")
def test_a_task_from_a_local_file_and_its_resumption(
    experiment: Callable[..., list[str]],
    run: Callable,
    tasks: Path,
    tmp_path: Path,
    model: api.Model,
) -> None:
    argv = experiment('axis("dtype", ["float32"])', evaluates("local_words", tasks))
    assert run(*argv).code == 0
    right = [
        np.argmax([expected(model, q["question"], f" {c}")[0] for c in q["choices"]]) == q["label"]
        for q in QUESTIONS
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


@pytest.mark.usefixtures("nothing_loads")
def test_an_unknown_task_is_found_before_anything_runs(
    experiment: Callable[..., list[str]],
    refuses: Callable[..., None],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = functools.partial(lm_eval.tasks.TaskManager, include_path=tasks, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **kwargs: own())
    for more in ([], ["--dry_run"]):
        argv = experiment('axis("n", [1])', evaluates("local_word", tasks))
        refuses([*argv, *more], "has no task 'local_word', and", "did you mean local_words?")
    assert not (tmp_path / "w").exists()


@pytest.mark.usefixtures("loaded")
def test_a_config_that_says_how_to_answer(
    experiment: Callable[..., list[str]], run: Callable, tasks: Path, tmp_path: Path
) -> None:
    """It wins over the task's own settings, and what would change nothing is refused."""
    sweep = """[
        {"max_tokens": 3}, {"stop": ("e",), "stop_ids": "7"}, {"sampling.temperature": 1.5},
        {"sampling.temperature": 1.5, "sampling.seed": 1}, {"sampling.temperature": 0.0},
        {"sampling.seed": 1}, {"sampling.top_p": 0.5},
    ]"""
    chat = (
        "config.experiment.eval.apply_chat_template = True; config.system = 'Be brief.'; "
        "config.slots = 8"
    )
    result = run(*experiment(sweep, evaluates("local_lines", tasks, chat)))
    assert result.code == 1 and "5 finished, 2 failed" in result.out, result
    events = lines(tmp_path / "w" / "metrics.jsonl")
    reasons = [event["reason"] for event in events if event["event"] == "failed"]
    assert all("changes nothing: local_lines answers greedily" in reason for reason in reasons)
    points: dict[str, list[dict[str, Any]]] = {}
    for line in lines(tmp_path / "w" / "outputs.jsonl"):
        points.setdefault(line["point"], []).append(line)
    short, stopped, warm, other, greedy = points.values()
    assert {line["max_tokens"] for line in short} == {3}
    assert {line["max_tokens"] for line in stopped + warm + other + greedy} == {6}
    assert not any("e" in line["response"] for line in stopped)
    assert {(*line["stop"], *line["stop_ids"]) for line in stopped} == {("e", 7)}
    assert any("e" in line["response"] for line in greedy)
    # The task's two repeats are two draws, and one greedy answer.
    assert len(greedy) == 3 and sorted(line["repeat"] for line in warm) == [0] * 3 + [1] * 3
    assert len({line["sampling"]["seed"] for line in warm + other}) == 12
    assert len({line["response"] for line in warm + other}) > 6
    # Answers are recorded as they finish.
    assert (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhaiku: snow<|im_end|>\n"
        "<|im_start|>assistant\nthe"
    ) in [line["arguments"][0] for line in greedy]


@pytest.mark.usefixtures("loaded")
def test_settings_of_answers_where_none_are_written(
    experiment: Callable[..., list[str]], run: Callable, tasks: Path, tmp_path: Path
) -> None:
    argv = experiment('axis("max_tokens", [256, 5])', evaluates("local_words", tasks))
    result = run(*argv)
    assert result.code == 1 and "1 finished, 1 failed" in result.out
    (failed,) = [e for e in lines(tmp_path / "w" / "metrics.jsonl") if e["event"] == "failed"]
    assert "max_tokens changes nothing: these tasks generate no text" in failed["reason"]


@pytest.mark.usefixtures("loaded")
def test_what_the_harness_prints_is_no_table(
    experiment: Callable[..., list[str]],
    run: Callable,
    tasks: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """It tells on stdout that it estimates the error of a perplexity, with processes it forks."""
    done = run(*experiment('axis("dtype", ["float32"])', evaluates("local_scores", tasks)))
    assert done.code == 0 and "local_scores.perplexity" in done.out
    assert "bootstrapping" not in done.out
    assert not [str(w.message) for w in recwarn if "fork" in str(w.message)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--tasks", "local_lines,nowhere"],
            "Tasks not found: nowhere; `python -m qwen_jax",
        ),
        (["--tasks", "nowhere.yaml"], "nowhere.yaml; `python -m qwen_jax.lm_eval ls tasks` lists"),
        (["--tasks", "local_lines", "--model", "qwen"], "ours is --model qwen_jax."),
        (
            ["--tasks", "local_lines", "--fewshot_as_multiturn", "True"],
            "`apply_chat_template` must be set; `python -m qwen_jax.lm_eval run --help` shows",
        ),
    ],
)
def test_what_the_command_does_not_know_is_told_in_a_line(
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    # Its own tasks, thousands of files, are read in half a minute.
    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    given = ["lm_eval", "--model", "qwen_jax", "--include_path", str(tasks), *arguments]
    monkeypatch.setattr(sys, "argv", given)
    assert command.main() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error


def test_the_documented_command(tasks: Path, tmp_path: Path) -> None:
    """lm_eval's own command line, as a process, with our model in it."""
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "qwen_jax.lm_eval", "--model", "qwen_jax", "--model_args"),
        *("model=haiku,dtype=float32,max_length=64", "--tasks", "local_lines", "--seed", "7"),
        *("--include_path", str(tasks), "--apply_chat_template", "--num_fewshot", "1"),
        *("--batch_size", "auto", "--gen_kwargs", "temperature=2,do_sample=True", "top_k=50"),
        *("--log_samples", "--output_path", str(out)),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "local_lines" in done.stdout and "exact_match" in done.stdout
    (path,) = out.rglob("samples_*.jsonl")
    samples = lines(path)
    for sample in samples:
        assert sample["arguments"]["gen_args_0"]["arg_0"].endswith("<|im_start|>assistant\nthe")
    # Two draws each, of which the model, sure of its lines, may make one text.
    drawn = [sample["resps"][0] for sample in samples]
    assert list(map(len, drawn)) == [2] * 3 and any(len(set(pair)) == 2 for pair in drawn)


@pytest.mark.usefixtures("loaded")
def test_a_task_shows_its_own_examples_unless_told(
    experiment: Callable[..., list[str]], run: Callable, tasks: Path, tmp_path: Path
) -> None:
    shown = "num_fewshot: 1\nfewshot_split: test\n"
    (tasks / "lines.yaml").write_text((tasks / "lines.yaml").read_text() + shown)
    sweep = '[{"experiment.eval.limit": 1}, {"experiment.eval.shots": 0}]'
    assert run(*experiment(sweep, evaluates("local_lines", tasks))).code == 0
    prompts = [line["arguments"][0] for line in lines(tmp_path / "w" / "outputs.jsonl")]
    assert [prompt.count("haiku: ") for prompt in prompts] == [2, 1, 1, 1]
