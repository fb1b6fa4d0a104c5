"""lm-evaluation-harness over our model. Needs the extra `eval`, so it runs in `make parity`."""

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from qwen_jax import api
from qwen_jax import lm_eval as command
from qwen_jax.errors import UserError
from qwen_jax.generation import Completion
from qwen_jax.sampling import Sampling
from tests.cli.conftest import REPOSITORY
from tests.experiments.conftest import lines

pytest.importorskip("lm_eval", reason="needs pip install '.[eval]'")
import lm_eval.tasks
from lm_eval.api.instance import Instance

from qwen_jax.experiments.harness import Harness

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


def instance(*arguments: Any) -> Instance:
    return Instance("generate_until", {}, arguments, 0)


def refused(words: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    with pytest.raises(UserError) as error:
        call(*arguments, **named)
    assert words in str(error.value)


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
    requests = [instance(*pair) for pair in pairs]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    for (logprob, greedy), pair in zip(found, pairs, strict=True):
        wanted = expected(model, *pair)
        assert logprob == pytest.approx(wanted[0], rel=1e-5) and greedy == wanted[1]
    # The whole text, each token given all before it and the first given the end of a text.
    text = "the moon over the river"
    (rolled,) = harness.loglikelihood_rolling([instance(text)], disable_tqdm=True)
    tokens = [harness.prefix_token_id, *model.tokenizer.encode(text)]
    logprobs = log_softmax(model.logits(tokens).astype(np.float64), axis=-1)
    total = sum(logprobs[i, t] for i, t in enumerate(tokens[1:]))
    assert rolled == pytest.approx(total, rel=1e-5)

    until = {"until": ["\n"], "max_gen_toks": 20}
    (line,) = harness.generate_until([instance("the moon", until)], True)
    whole = model.generate("the moon", raw=True, max_tokens=20)
    assert isinstance(whole, Completion) and line == whole.text.split("\n")[0]
    assert len(kept) == 4


DRAW = {"until": ["\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8}


def test_repeats_are_draws_of_their_own(model: api.Model) -> None:
    """Whatever the order and the batch; what the engine draws from the recorded seed is it."""
    kept: dict[str, Any] = {}
    harness = Harness(model, 8, keep=kept.__setitem__)
    requests = [instance(text, dict(DRAW)) for text in ["the moon"] * 4 + ["haiku: snow"] * 4]
    found = harness.generate_until(requests, disable_tqdm=True)
    assert len(set(found)) == 8
    assert [line["response"] for line in kept.values()] == found
    assert [line["repeat"] for line in kept.values()] == [0, 1, 2, 3] * 2
    for line in list(kept.values())[2::3]:
        again = model.generate(
            line["arguments"][0],
            raw=True,
            max_tokens=line["max_tokens"],
            stop=line["stop"],
            sampling=Sampling(**line["sampling"]),
        )
        assert isinstance(again, Completion) and again.text == line["response"]
    mixed = [requests[i] for i in (4, 0, 5, 1, 2, 6, 3, 7)]
    shuffled = Harness(model, 8).generate_until(mixed, disable_tqdm=True)
    assert shuffled == [found[i] for i in (4, 0, 5, 1, 2, 6, 3, 7)]
    other = Harness(model, 8, seed=1).generate_until(requests, disable_tqdm=True)
    assert not set(other) & set(found)
    # A task's own seed is the harness' where it has none.
    named = [instance(r.args[0], DRAW | {"seed": 0}) for r in requests]
    assert Harness(model, 8, seed=1).generate_until(named, disable_tqdm=True) == found

    # What an interrupted run has kept is not asked for again, and each repeat has its own.
    most = {key: line["response"] for key, line in kept.items() if line != list(kept.values())[2]}
    later: list[str] = []
    resumed = Harness(model, 8, answers=most, keep=lambda key, line: later.append(key))
    assert resumed.generate_until(requests, disable_tqdm=True) == found
    assert later == [list(kept)[2]]


def test_greedy_repeats_are_made_once(model: api.Model) -> None:
    kept: list[str] = []
    harness = Harness(model, 1, keep=lambda key, line: kept.append(key))
    greedy = DRAW | {"do_sample": False}
    found = harness.generate_until([instance("the moon", greedy)] * 4, disable_tqdm=True)
    assert len(set(found)) == len(kept) == 1


def test_a_prompt_is_never_eaten(model: api.Model, caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(model, max_length=16)
    text = "the moon over the river"
    tokens = model.tokenizer.encode(text)
    room = 16 - len(tokens)
    assert room > 1
    fits = harness._request(text, {"max_gen_toks": room})
    assert (fits.tokens, fits.max_tokens) == (tokens, room) and not caplog.messages
    for most in (room + 1, 15, 16, 32768):
        request = harness._request(text, {"max_gen_toks": most})
        assert (request.tokens, request.max_tokens) == (tokens, room)
    assert len(caplog.messages) == 1 and f"prompt of {len(tokens)}" in caplog.text
    refused("leaves no room for an answer in the context of 16", harness._request, text * 4, {})
    exact = Harness(model, max_length=len(tokens))
    refused(f"A prompt of {len(tokens)} tokens, 'the moon", exact._request, text, {})
    # Nothing to continue: the harness' own models begin with the token that ends a text.
    assert harness._request("", {}).tokens == [harness.prefix_token_id]


def test_scores_at_the_edges(model: api.Model, caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(model, max_length=8)

    def score(context: str, continuation: str) -> tuple[float, bool]:
        (found,) = harness.loglikelihood([instance(context, continuation)], disable_tqdm=True)
        return found

    # Left out at the front, with a warning.
    long = "the moon over the river again and again the moon"
    tokens = model.tokenizer.encode(long + " over")[-9:]
    logprobs = log_softmax(model.logits(tokens[:-1])[-1].astype(np.float64))
    assert score(long, " over")[0] == pytest.approx(logprobs[tokens[-1]], rel=1e-5)
    assert "is longer than the model's of 8" in caplog.text
    # Spaces go to the continuation, of which none may be left for the context.
    assert score("  ", "moon") == score("", "  moon")
    refused("'' has no token of its own behind 'the moon'", score, "the moon", "")
    refused("'' has no token of its own behind ''", score, "", "")
    refused("is longer than the context of 8", score, "the", long)
    assert harness.loglikelihood_rolling([instance("")], disable_tqdm=True) == [0.0]


def test_arguments(model: api.Model, caplog: pytest.LogCaptureFixture) -> None:
    refused("mean the same", Harness, "a.gguf", pretrained="b.gguf")
    refused("max_length is 0", Harness, model, max_length=0)
    refused("but it must be from 1 to 512", Harness, model, max_length=10**6)
    refused("max_gen_toks is 0", Harness, model, max_gen_toks=0)
    refused("prefix_token_id is 5000", Harness, model, prefix_token_id=5000)
    refused("generation_config is 'yes'", Harness, model, generation_config="yes")
    refused("no argument dtyp; did you mean dtype?", Harness, dtyp="float32")
    refused("dtype is 'float8'", Harness, dtype="float8")
    refused("already loaded", Harness, model, dtype="float32")
    refused("has no chat template of the name 'rag'", Harness(model).chat_template, "rag")
    harness = Harness(pretrained=model, max_gen_toks=7, prefix_token_id=5, trust_remote_code=True)
    assert harness.prefix_token_id == 5 and harness._request("a", {}).max_tokens == 7
    assert "/" not in harness.tokenizer_name
    assert harness.chat_template(True) == model.tokenizer.chat_template


def test_texts_begin_as_the_checkpoint_has_it(
    model: api.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lm_eval's `hf`: a prefix is put before a text, unless it begins so or nobody wants one."""
    harness, plain = Harness(model), model.tokenizer.encode("the moon")
    assert harness.tok_encode("the moon") == plain  # Qwen2.5 has none.
    end = harness.eot_token_id
    monkeypatch.setattr(type(model.tokenizer), "prefix_ids", (end,))
    assert harness.tok_encode("the moon") == [end, *plain]
    assert harness.tok_encode("the moon", add_special_tokens=False) == plain
    marked = model.tokenizer.decode([end], skip_special=False) + "the moon"
    assert harness.tok_encode(marked) == [end, *plain]
    assert harness.tok_encode(marked, add_special_tokens=True) == [end, end, *plain]


def test_the_seed_is_the_command_lines(model: api.Model) -> None:
    """lm_eval seeds Python's generator and then makes the model, which leaves it as it was."""

    def drawn(flag: int, **given: Any) -> tuple[int, float]:
        random.seed(flag)
        harness = Harness.create_from_arg_obj({"model": model, **given}, {"device": None})
        return harness._request("a", {"temperature": 1}).sampling.seed, random.random()

    assert drawn(7) == drawn(7) != drawn(8)
    assert drawn(7)[1] == drawn(7, seed=5)[1] and drawn(7, seed=5)[0] == 5


def test_batches_as_large_as_fit(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [model.request("the moon", raw=True)] * 40
    assert Harness(model, "auto")._rows(requests) == 64
    assert Harness(model, "auto", max_batch_size=16)._rows(requests) == 16
    assert Harness(model, 4)._rows(requests) == 4
    assert [Harness(model, 12)._rows(requests[:n]) for n in (0, 1, 2, 3, 9)] == [1, 1, 2, 4, 12]

    def check_fits(request: object, n: int) -> None:
        if n > 12:
            raise UserError("too many")

    monkeypatch.setattr(model, "check_fits", check_fits)
    assert Harness(model, "auto")._rows(requests) == 8


def test_what_was_thought_is_dropped(model: api.Model) -> None:
    options = {"max_gen_toks": 30, "until": None}
    (whole,) = Harness(model).generate_until([instance("the moon", options)], disable_tqdm=True)
    end = whole.split()[2]
    tokens = model.generate("the moon", raw=True, max_tokens=30).tokens
    # The last time counts, as in lm_eval's own models.
    for marker in (end, tokens[5], str(tokens[5])):
        harness = Harness(model, think_end_token=marker)
        (found,) = harness.generate_until([instance("the moon", options)], disable_tqdm=True)
        if marker == end:
            assert found == whole.split(end)[-1].lstrip()
        else:
            last = len(tokens) - tokens[::-1].index(tokens[5])
            assert found == model.tokenizer.decode(tokens[last:]).lstrip()


def test_chats(model: api.Model) -> None:
    harness = Harness(model)
    chat = [
        {"role": "user", "content": "Name a city"},
        {"role": "assistant", "content": "The city is"},
    ]
    prefix = harness.apply_chat_template(chat, add_generation_prompt=False)
    assert prefix.endswith("<|im_start|>assistant\nThe city is")
    assert harness.apply_chat_template(chat).endswith("<|im_end|>\n<|im_start|>assistant\n")


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
        "config.batch_size = 8"
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
    assert len(greedy) == 3 and [line["repeat"] for line in warm] == [0, 1] * 3
    assert len({line["sampling"]["seed"] for line in warm + other}) == 12
    assert len({line["response"] for line in warm + other}) > 6
    prompt = greedy[0]["arguments"][0]
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhaiku: snow<|im_end|>\n"
        "<|im_start|>assistant\nthe"
    )


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
