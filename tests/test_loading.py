"""While a model loads, its tokenizer is read beside its weights: which of two errors is told."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

import qwen_jax
from qwen_jax import loading
from qwen_jax.errors import UserError


def failing(problem: str) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise UserError(problem)

    return fail


def test_a_bad_tokenizer_is_told_before_bad_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "prepare", failing("bad weights"))
    with pytest.raises(UserError, match="bad weights"):
        qwen_jax.load()
    monkeypatch.setattr(loading, "read_tokenizer", failing("bad tokenizer"))
    with pytest.raises(UserError, match="bad tokenizer"):
        qwen_jax.load()


def test_a_bad_tokenizer_ends_the_loading_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def many(*_: object, progress: Callable[[int, int], None]) -> Iterator[Any]:
        nonlocal read
        for read in range(1000):
            time.sleep(0.01)
            progress(read, 1000)
        yield from ()

    monkeypatch.setattr(loading, "iter_parameters", many)
    monkeypatch.setattr(loading, "prepare", lambda _, parameters, *__: dict(parameters))
    monkeypatch.setattr(loading, "read_tokenizer", failing("bad tokenizer"))
    with pytest.raises(UserError, match="bad tokenizer"):
        qwen_jax.load()
    assert read < 900


@pytest.mark.parametrize("given", [None, "true"])
def test_a_gpus_memory_is_taken_as_it_is_needed(given: str | None) -> None:
    """JAX reads it when it wakes the device; who has asked for something else gets it."""
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    environment = {k: v for k, v in os.environ.items() if k != name}
    if given is not None:
        environment[name] = given
    done = subprocess.run(
        [sys.executable, "-c", f"import os, qwen_jax; print(os.environ[{name!r}])"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (given or "false")
