"""A recorder's command line, for modules with a fixture `recorder` and the `TOKENS` to record."""

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

Record = Callable[..., str]


@pytest.fixture
def record(
    recorder: types.ModuleType,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Record:
    """It; gives what it prints."""
    usual = ",".join(map(str, request.module.TOKENS))

    def record(path: Path | str, *flags: str, tokens: str = usual) -> str:
        monkeypatch.setattr(sys, "argv", [f"{recorder.__name__}.py", str(path), tokens, *flags])
        recorder.main()
        return capsys.readouterr().out

    return record
