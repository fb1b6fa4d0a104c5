"""`run.py chat` at a terminal, as somebody types and pastes."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import REPOSITORY

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("setsid") is None, reason="there is no setsid"),
]
pytest.importorskip("prompt_toolkit", reason="needs pip install '.[chat]'")

ENTER, CTRL_C, CTRL_D = "\r", "\x03", "\x04"
POSITION = "\x1b[6n"
"""Asks a terminal where its cursor is."""


class Terminal:
    """A program at a terminal of its own.

    Attributes:
        shown: all that it has written, without what moves the cursor.
    """

    def __init__(self, *command: str, folder: Path):
        self._side, other = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
        # Only whose terminal it is hears of Ctrl-C.
        owned = ["setsid", "--ctty", *command]
        self.process = subprocess.Popen(
            owned, cwd=folder, env=environment, stdin=other, stdout=other, stderr=other
        )
        os.close(other)
        self._raw = self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._side, text.encode())

    def wait(self, pattern: str, seconds: float = 60) -> None:
        """Until it has written what fits since the last time."""
        until = time.monotonic() + seconds
        while not re.search(pattern, self.shown, re.DOTALL):
            assert time.monotonic() < until, f"{pattern!r} never comes: {self.shown[-800:]!r}"
            if not select.select([self._side], [], [], 0.1)[0]:
                continue
            new = os.read(self._side, 1 << 16).decode(errors="replace")
            if POSITION in new:
                self.type("\x1b[1;1R")
            self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", new)
        self.shown = ""

    def close(self) -> int:
        code = self.process.wait(60)
        os.close(self._side)
        return code


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    command = [sys.executable, str(REPOSITORY / "run.py"), "chat", "--max_tokens=300"]
    found = Terminal(*command, folder=tmp_path)
    yield found
    found.process.kill()


def test_a_chat(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait("/help lists what else there is.*>")
    terminal.type("haiku: snow" + ENTER)
    terminal.wait("the snow at daybreak.*the world starts over.*>")
    # What is pasted is one message, however many lines it has.
    terminal.type("\x1b[200~haiku:\nmoss\n\nand rain\x1b[201~")
    terminal.wait("and rain")
    terminal.type(ENTER)
    terminal.wait("the first drops of rain.*>")
    # Nothing ends an answer here, but for who is asked.
    terminal.type("/set temperature 30" + ENTER)
    terminal.wait("temperature 30.*>")
    terminal.type("go on" + ENTER)
    terminal.wait("go on.{300}")
    terminal.type(CTRL_C)
    terminal.wait(r"\(interrupted\).*>")
    terminal.type("half a line")
    terminal.wait("half a line")
    terminal.type(CTRL_C)
    terminal.wait(">")
    terminal.type("/save chat.json" + ENTER)
    terminal.wait("wrote chat.json.*>")
    terminal.type("/clear" + ENTER)
    terminal.wait("begins anew.*>")
    terminal.type("/load chat.json" + ENTER)
    terminal.wait("6 messages from chat.json.*>")
    terminal.type(CTRL_D)
    assert terminal.close() == 0
    said = json.loads((tmp_path / "chat.json").read_text())["messages"]
    asked = [message["content"] for message in said if message["role"] == "user"]
    assert asked == ["haiku: snow", "haiku:\nmoss\n\nand rain", "go on"]
    assert len(said[-1]["content"]) > 100
