"""`run.py compare --logprobs`: from two files to a report, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def write(path: Path, shift: float = 0.0) -> Path:
    values = [-0.1 * (i % 7) - 0.3 for i in range(20)]
    lines = [
        {
            "id": i,
            "tokens": list(range(20)),
            "logprobs": [None, *(x - shift * i for x in values[1:])],
        }
        for i in range(3)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_without_a_model(run: Run, tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", 0.01)
    out = tmp_path / "report"
    gates = "logprob_unexplained > 0, kl_k3 > 1, ess < 0.5"
    done = run("compare", f"--logprobs={a},{b}", f"--fail_if={gates}", f"--workdir={out}")
    assert done.code == 1, done.err
    assert "UNEXPLAINED without a model." in done.out
    assert "2 of 3 texts differ by more than float32's rounding: '1', '2'" in done.out
    assert all(len(line) <= 100 for line in done.out.splitlines())
    metrics = json.loads((out / "report.json").read_text())["metrics"]
    assert metrics["logprob_unexplained"] == 1 and metrics["kl_k3"] < 1e-3
    assert run("compare", f"--logprobs={a},{a}", "--fail_if=logprob_unexplained > 0").code == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--logprobs=a.jsonl"], "--logprobs=a.jsonl names 1 files, but it takes two with a comma"),
        (["--logprobs=nowhere,{a}"], "--logprobs: nowhere can't be read: No such file"),
        (["--logprobs={a},/dev/zero"], "--logprobs: /dev/zero can't be read: it is a device"),
        (["--parts=logprobs"], "The part logprobs needs --logprobs=a.jsonl,b.jsonl."),
        (["--logprobs={a},{a}", "--parts=tensors"], "two logs, which have no tensors"),
        (["--logprobs={a},{a}", "--candidate=x"], "--logprobs and --candidate are two comparisons"),
        (["--logprobs={a},{a}", "--plant=zero_qkv_bias"], "--plant does nothing for --logprobs"),
        (["--logprobs={a},{a}", "--prompt=x"], "--prompt does nothing for --logprobs without"),
        (["--logprobs={a},{a}", "--sha256=x"], "--sha256 does nothing for --logprobs without"),
        (
            ["--logprobs={a},{a}", "--model=haiku", "--dtype=float32"],
            "--dtype does nothing for --lo",
        ),
        (["--logprobs={a},{a}", "--fail_if=ppl>1"], "needs ppl, which the part distribution"),
        (["--fail_if=ess<1"], "needs ess, which the part logprobs measures"),
        (["--save_base=x", "--logprobs={a},{a}"], "--logprobs does nothing for --save_base"),
        (["--logprobs={a},{a}", "--model=nowhere.gguf"], "nowhere.gguf: there is no such file"),
    ],
)
def test_refused(refuses: Callable[..., None], tmp_path: Path, argv: list[str], words: str) -> None:
    a = write(tmp_path / "a.jsonl")
    refuses(["compare", *(word.format(a=a) for word in argv)], words)
