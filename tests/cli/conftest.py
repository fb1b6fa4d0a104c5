"""run.py in this process, and the bundled model loaded once for all of its tests."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax import api, cli

REPOSITORY = Path(__file__).parents[2]
BUNDLED = api.locate()
HAIKU = "a thin rising moon\nlantern passes like a cloud\nnothing is missing"
"""What the bundled model answers where nothing is asked."""


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


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
    return api.load()


@pytest.fixture
def loaded(model: api.Model, monkeypatch: pytest.MonkeyPatch) -> api.Model:
    """run.py finds the bundled model loaded, and compiled by earlier tests."""
    monkeypatch.setattr(api, "load", lambda *args, **kwargs: model)
    return model


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(api, "load", load)
