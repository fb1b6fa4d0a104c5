"""Ctrl-C at every stage."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_jax import interrupts
from qwen_jax.weights import loader
from tests.cli.conftest import HAIKU, Result, Run, interrupts_at


def test_while_loading(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    path.write_text("moon\n")
    monkeypatch.setattr(loader, "decode", lambda *args: signal.raise_signal(2))
    result = run(f"--prompt_file={path}", f"--output={output}")
    assert result == Result(130, "", "interrupted\n")
    assert not output.exists()


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("program", "call"), [("extend", 1), ("step", 3)])
def test_while_generating(
    run: Run, monkeypatch: pytest.MonkeyPatch, program: str, call: int
) -> None:
    with monkeypatch.context() as patch:
        interrupts_at(patch, program, call)
        result = run()
    assert result.code == 130
    assert result.err.endswith("interrupted\n")
    if program == "extend":
        assert result.out == "" and result.err == "interrupted\n"
    else:
        text = result.out.removesuffix("\n")
        assert result.out.endswith("\n") and 0 < len(text) < len(HAIKU)
        assert HAIKU.startswith(text)
        assert "finished    interrupted" in result.err
    # Nothing half done is left behind for whoever goes on with the model.
    assert run().out == f"{HAIKU}\n"


@pytest.mark.usefixtures("loaded")
def test_several_samples(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupts_at(patch, "step", 3)
        result = run("--n=2", "--temperature=1")
    assert result.code == 130 and "finished    interrupted 2" in result.err
    whole = run("--n=2", "--temperature=1").out.split("--- sample ")
    begun = result.out.split("--- sample ")
    assert len(begun) == len(whole) == 3
    for part, text in zip(begun[1:], whole[1:], strict=True):
        assert len("1\n") < len(part) < len(text) and text.startswith(part.removesuffix("\n"))


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("ordered", [(), ("--ordered",)])
def test_what_a_prompt_file_has_answered_is_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ordered: tuple[str, ...]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("moon\nsnow\nriver\npond\n")
    argv = [f"--prompt_file={path}", "--slots=1", *ordered]
    whole = run(*argv).out.splitlines()
    assert [json.loads(line)["id"] for line in whole] == [1, 2, 3, 4]
    steps_of = [-(-len(json.loads(line)["tokens"]) // 4) for line in whole]
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        interrupts_at(patch, "step", sum(steps_of[:2]) + 1)
        result = run(*argv, f"--output={output}")
    assert (result.code, result.out) == (130, "")
    assert "finished    stop 2" in result.err and result.err.endswith("interrupted\n")
    assert output.read_text().splitlines() == whole[:2]


@pytest.mark.usefixtures("loaded")
def test_answers_that_wait_for_their_turn_are_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first prompt's is the longest, so that the other is held back when Ctrl-C comes."""
    path, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": "moon"}\n{"prompt": "snow", "max_tokens": 2}\n')
    with monkeypatch.context() as patch:
        interrupts_at(patch, "step", 3)
        result = run(f"--prompt_file={path}", f"--output={output}", "--ordered")
    assert result.code == 130 and "finished    length 1, interrupted 1" in result.err
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [2]


def test_while_importing() -> None:
    program = (
        "import signal; from qwen_jax import interrupts\n"
        "with interrupts.handled_by(interrupts.exit_at_once): signal.raise_signal(2)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(("result", "code"), [("2", 2), ("130", 130)])
def test_the_process_ends_without_more_ado(result: str, code: int) -> None:
    """After Ctrl-C, which may have stopped XLA midway, nothing of Python's end is run."""
    program = (
        "import atexit, sys; from qwen_jax import cli\n"
        "def main(**_):\n"
        "    atexit.register(lambda: print(', end', end=''))\n"
        f"    print('text', end=''); return {result}\n"
        "cli.main = main; cli.entry()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout == ("text" if code == 130 else "text, end")


def test_in_a_callback_that_would_swallow_it() -> None:
    finished = []

    def _xla_gc_callback() -> None:
        signal.raise_signal(signal.SIGINT)
        finished.append(True)

    with (
        pytest.raises(KeyboardInterrupt),
        interrupts.handled_by(interrupts.raise_interrupt),
    ):
        _xla_gc_callback()
        for _ in range(1000):  # one long sleep would not end
            time.sleep(0.01)
    assert finished == [True]


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.handled_by(interrupts.exit_at_once):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
