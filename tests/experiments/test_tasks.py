"""The tasks perplexity, compare and bench, and profiles, on the bundled model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from qwen_jax import api
from qwen_jax.engine import memory
from tests.experiments.conftest import lines

OPERATIONS = {
    *("embed", "attn_norm", "qkv_proj", "rope", "cache_write", "gqa_decode_attention", "o_proj"),
    *("gqa_prefill_attention", "ffn_norm", "gate_up_proj", "ffn_act", "down_proj", "final_norm"),
    *("lm_head", "other"),
}
TEXT = "the moon over the river, and a lantern in the snow; " * 24


def finished(workdir: Path) -> dict[str, Any]:
    (event,) = (e for e in lines(workdir / "metrics.jsonl") if e["event"] == "finished")
    return event


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.usefixtures("loaded")
def test_perplexity(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    model: api.Model,
    text: Path,
) -> None:
    argv = experiment(
        'axis("experiment.context", [64])',
        f"config.experiment.task = 'perplexity'; config.experiment.text = {str(text)!r}",
    )
    assert run(*argv).code == 0
    tokens = model.tokenizer.encode(TEXT)
    nll = []
    for start in range(0, len(tokens) // 64 * 64, 64):
        window = tokens[start : start + 64]
        logprobs = log_softmax(model.logits(window).astype(np.float64), axis=-1)
        nll += [-logprobs[i, window[i + 1]] for i in range(32, 63)]
    metrics = finished(tmp_path / "w")["metrics"]
    assert metrics["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-9)
    error = np.exp(np.mean(nll)) * np.std(nll, ddof=1) / len(nll) ** 0.5
    assert metrics["perplexity_error"] == pytest.approx(error, rel=1e-9)
    assert metrics["scored_tokens"] == len(nll)
    # What an interrupted session left is used: cut to one window, the result is the same.
    outputs = tmp_path / "w" / "outputs.jsonl"
    outputs.write_text(outputs.read_text().splitlines(True)[0])
    events = tmp_path / "w" / "metrics.jsonl"
    events.write_text("".join(x for x in events.open() if "finished" not in x))
    assert run(*argv).code == 0
    assert finished(tmp_path / "w")["metrics"] == metrics


def test_compare_with_another_type_and_with_the_truth(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    model: api.Model,
    text: Path,
) -> None:
    sweep = (
        'chain([{"experiment.reference.quantization": "F32"}], '
        '[{"experiment.reference.dtype": "float64"}], '
        '[{"experiment.reference.quantization": "F32", "experiment.quantization": "Q2_K"}])'
    )
    setting = f"config.experiment.task = 'compare'; config.experiment.text = {str(text)!r}"
    argv = experiment(sweep, f"{setting}; config.experiment.context = 64")
    assert run(*argv).code == 0
    events = [e for e in lines(tmp_path / "w" / "metrics.jsonl") if e["event"] == "finished"]
    itself, truth, coarse = (e["metrics"] for e in events)
    # Q8_0 written as F32 is the same model; the reference is kept in float32.
    assert abs(itself["kld"]) < 1e-7 and itself["same_top"] == 1
    assert abs(truth["kld"]) < 1e-7 and truth["same_top"] == 1
    assert coarse["kld"] > 0.01 and coarse["weight_bytes"] < itself["weight_bytes"] / 3
    assert truth["perplexity"] == pytest.approx(itself["perplexity"], rel=1e-5)


def test_compare_needs_a_reference(
    experiment: Callable[..., list[str]], refuses: Callable[..., None]
) -> None:
    argv = experiment('axis("sampling.seed", [1])', "config.experiment.task = 'compare'")
    refuses(argv, "compare needs a reference")


@pytest.mark.usefixtures("loaded")
def test_bench_and_profile(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    argv = experiment(
        'axis("slots", [2])',
        "config.experiment.task = 'bench'; config.experiment.bench.prompt_tokens = 20; "
        "config.experiment.bench.new_tokens = 8; config.experiment.bench.repeats = 3",
    )
    assert run(*argv, "--profile").code == 0
    event, outputs = finished(tmp_path / "w"), lines(tmp_path / "w" / "outputs.jsonl")
    decode = [o["decode_seconds"] for o in outputs]
    assert len(decode) == 3
    assert event["metrics"]["decode_tokens_per_s"] == pytest.approx(16 / np.median(decode))
    assert event["metrics"]["ms_per_step"] == pytest.approx(1e3 * np.median(decode) / 8)
    operations = event["operations"]
    programs, names = zip(*(o["operation"].split(": ") for o in operations), strict=True)
    assert {"step", "extend"} <= set(programs) and all(0 < o["share"] < 1 for o in operations)
    assert {"qkv_proj", "gate_up_proj", "down_proj"} <= set(names) <= OPERATIONS, operations
    seconds = [o["seconds"] for o in operations]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] > 0
    assert "Slowest operations" in (tmp_path / "w" / "report.html").read_text()


@pytest.mark.usefixtures("loaded")
def test_texts_that_fit_nowhere_stop_no_other(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    argv = experiment(
        'axis("slots", [1000, 1])',
        "config.experiment.task = 'bench'; config.experiment.bench.prompt_tokens = 4; "
        "config.experiment.bench.new_tokens = 2; config.experiment.bench.repeats = 1",
    )
    monkeypatch.setattr(memory, "free_memory", lambda: 20 * 10**6)
    result = run(*argv)
    assert result.code == 1 and "1 finished, 1 failed." in result.out
    assert "out of memory: 1000 texts of up to 8 tokens are more than" in result.out


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("config.experiment.task = 'os:getcwd'", "'os:getcwd', but that is no subclass of Task"),
        ("config.experiment.task = 'tests.experiments.fake:Missing'", "can't be imported"),
        (
            "config.experiment.task = 'generate'; config.experiment.scores = ('os:sep',)",
            "'os:sep', but that is no function",
        ),
        ("config.experiment.task = 'bench'; config.sampling.seed = -1", "sampling.seed is -1"),
        ("config.experiment.task = 'bench'; config.slots = 0", "slots is 0"),
        ("config.experiment.task = 'perplexity'; config.slots = -1", "slots is -1"),
        ("config.matmul_precision = 'exact'", "matmul_precision is 'exact'"),
        (
            "config.experiment.task = 'compare'; config.experiment.reference.dtype = 'float8'",
            "experiment.reference: dtype is 'float8'",
        ),
        ("config.experiment.task = 'bench'; config.experiment.bench.repeats = 0", "repeats is 0"),
        ("config.experiment.task = 'perplexity'; config.experiment.text = 'no.txt'", "no.txt"),
        ("config.experiment.task = 'perplexity'; config.experiment.context = 3", "at least 4"),
        ("config.experiment.task = 'eval'", "experiment.eval.tasks is empty"),
        (
            "config.experiment.task = 'eval'; config.experiment.eval.tasks = ('a',); config.n = 2",
            "n is 2, but a task",
        ),
        (
            "config.experiment.task = 'eval'; config.experiment.eval.tasks = ('a',); "
            "config.experiment.eval.fewshot_as_multiturn = True",
            "fewshot_as_multiturn needs experiment.eval.apply_chat_template",
        ),
        ("config.prompt = '-'; config.experiment.task = 'generate'", "can't read stdin"),
        ("config.experiment.task = 'generate'; config.n = 0", "n is 0"),
    ],
)
def test_refused(
    experiment: Callable[..., list[str]], refuses: Callable[..., None], setting: str, words: str
) -> None:
    refuses(experiment('axis("max_tokens", [8])', setting), words)


def test_a_task_whose_module_fails(
    experiment: Callable[..., list[str]],
    refuses: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "module_that_fails.py").write_text("1 / 0\n")
    argv = experiment('axis("n", [1])', "config.experiment.task = 'module_that_fails:Task'")
    refuses(argv, "names 'module_that_fails:Task'", "ZeroDivisionError: division by zero")
