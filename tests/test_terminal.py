"""What a terminal gets of what files hold: no commands, and no megabytes."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax import cli
from qwen_jax.errors import UserError
from qwen_jax.terminal import json_visible, message, one_line, visible
from tests.cli.conftest import Run, loaded, model, refuses, run
from tests.cli.test_prompt_records import Terminal

__all__ = ["loaded", "model", "refuses", "run"]

COMMANDS = "\x1b[31m\x07\x7f\x9b2J\u202e\r\u2028"


def test_commands_are_spelt_out() -> None:
    assert visible(COMMANDS) == r"\x1b[31m\x07\x7f\x9b2J\u202e\x0d\u2028"
    assert visible("é\t漢\n👍🏽") == "é\t漢\n👍🏽"
    text = json.dumps({COMMANDS: COMMANDS}, ensure_ascii=False)
    assert json.loads(json_visible(text)) == {COMMANDS: COMMANDS}
    assert json_visible(text).isprintable()


def test_one_line_stays_one() -> None:
    """Whatever ends a line for Python, which knows more ends than the line feed, is spelt out."""
    ends = "".join(chr(code) for code in range(0x3000) if len(f"a{chr(code)}b".splitlines()) > 1)
    assert {"\n", "\r", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"} <= set(ends)
    line = one_line(f"GET /{ends}ERROR: root")
    assert line.splitlines() == [line] and line.startswith(r"GET /\x0a\x0b") and r"\x85" in line
    assert one_line("é\t漢") == "é\t漢" and visible("two\nlines") == "two\nlines"
    assert str(UserError(f"a{ends}b")).isprintable()


def test_a_log_line_stays_one() -> None:
    """The log's own of a record that quotes a file, and not of a traceback."""
    record = logging.LogRecord("root", logging.WARNING, "", 0, "%s: odd", ("a\nERROR: b",), None)
    form = cli._Formatter("%(levelname)s: %(message)s")
    assert form.format(record) == r"WARNING: a\x0aERROR: b: odd"
    try:
        raise ValueError("no\nsuch")
    except ValueError:
        record.exc_info = sys.exc_info()
    _, *traceback = form.format(record).splitlines()
    assert traceback[0] == "  Traceback (most recent call last):" and traceback[-1] == "  such"
    assert all(line.startswith("  ") for line in traceback)


def test_messages_are_bounded() -> None:
    assert str(UserError(f"a{COMMANDS}")) == f"a{visible(COMMANDS)}"
    long = message("first " + "x" * 5_000_000 + " last")
    assert len(long) < 5000 and long.startswith("first x") and long.endswith("x last")


def test_of_files(refuses: Callable[..., None], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    (tmp_path / "model.safetensors").write_bytes(b"\2" + bytes(7) + b"{}")
    for value in (COMMANDS, "x" * 3_000_000):
        config.write_text(json.dumps({"model_type": value}))
        refuses(["inspect", str(tmp_path)], "only 'qwen2'", message(value)[:6])


@pytest.mark.usefixtures("loaded")
def test_of_prompts_and_answers(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    line = {"prompt": "snow", "label": COMMANDS, "max_tokens": 1, "id": COMMANDS}
    path.write_text(json.dumps(line))
    result = run(f"--prompt_file={path}")
    assert json.loads(result.out)["label"] == json.loads(result.out)["id"] == COMMANDS
    assert result.out.strip().isprintable()


@pytest.mark.usefixtures("loaded")
def test_a_models_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file gets it as it is, and a terminal sees it."""
    monkeypatch.setattr("qwen_jax.text.streaming.TextStream.finish", lambda _: COMMANDS)
    assert run("--max_tokens=1").out.endswith(f"{COMMANDS}\n")
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert run("--max_tokens=1").code == 0
    assert terminal.screen()[0].endswith(visible(COMMANDS))
