"""run.py in this process, and the bundled model loaded once for all of its tests."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qwen_jax import cli
from tests.fake_hub import hub_server

__all__ = ["hub_server"]

# This file is read before ../conftest.py has told JAX what to do, so it must not import JAX.
if TYPE_CHECKING:
    from qwen_jax import api

REPOSITORY = Path(__file__).parents[2]
BUNDLED = REPOSITORY / "qwen_jax" / "data" / "haiku.gguf"
HAIKU = "a deer lifts its head\nlantern passes like a cloud\nsomething watches back"
"""What the bundled model answers where nothing is asked."""


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def answers_in(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run.py in this process."""

    def run(*argv: str) -> Result:
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def refuses(run: Run) -> Callable[..., None]:
    """Asserts that run.py answers with one sentence in which some words stand, and nothing else."""

    def refuses(argv: list[str], *words: str) -> None:
        result = run(*argv)
        assert (result.code, result.out) == (2, ""), result
        assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
        for word in words:
            assert word in result.err

    return refuses


@pytest.fixture(scope="session")
def model() -> api.Model:
    from qwen_jax import api

    return api.load()


@pytest.fixture
def loaded(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> api.Model:
    """run.py finds the bundled model loaded, and compiled by earlier tests."""
    from qwen_jax.experiments.models import Sizes, remaker

    def load(
        *args: object,
        slots: int | None = None,
        batch_invariant: bool = False,
        **kwargs: object,
    ) -> api.Model:
        return model if slots is None else remaker(model)(Sizes(slots, batch_invariant))

    monkeypatch.setattr("qwen_jax.api.load", load)
    return model


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("qwen_jax.api.load", load)


def interrupts_at(monkeypatch: pytest.MonkeyPatch, program: str, call: int) -> None:
    """Ctrl-C comes just before a program of the engine is called for so many times."""
    from qwen_jax.engine import steps

    real, calls = getattr(steps, program), itertools.count(1)

    def interrupted(*args: object) -> object:
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(steps, program, interrupted)
