"""Ctrl-C at every stage."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_jax import api, interrupts
from qwen_jax.weights import loader
from tests.cli.conftest import HAIKU, Result, Run


def test_while_loading(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    path.write_text("moon\n")
    monkeypatch.setattr(loader, "decode", lambda *args: signal.raise_signal(2))
    result = run(f"--prompt_file={path}", f"--output={output}")
    assert result == Result(130, "", "interrupted\n")
    assert not output.exists()


@pytest.mark.parametrize("step", ["prefill", "decode_many"])
def test_while_generating(
    run: Run, monkeypatch: pytest.MonkeyPatch, loaded: api.Model, step: str
) -> None:
    real, calls = getattr(loaded.engine, step), []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == (1 if step == "prefill" else 3):
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(loaded.engine, step, interrupted)
    result = run()
    assert result.code == 130
    assert result.err.endswith("interrupted\n")
    if step == "prefill":
        assert result.out == "" and result.err == "interrupted\n"
    else:
        text = result.out.removesuffix("\n")
        assert result.out.endswith("\n") and 0 < len(text) < len(HAIKU)
        assert HAIKU.startswith(text)
        assert "finished    interrupted" in result.err


def test_what_a_prompt_file_has_answered_is_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch, loaded: api.Model, tmp_path: Path
) -> None:
    real, calls = loaded.engine.prefill, []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(loaded.engine, "prefill", interrupted)
    path, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    path.write_text("moon\nsnow\nriver\npond\n")
    result = run(f"--prompt_file={path}", f"--output={output}", "--batch_size=1")
    assert (result.code, result.out) == (130, "")
    assert "finished    stop 2" in result.err and result.err.endswith("interrupted\n")
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [1, 2]


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
        "def main():\n"
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
