"""Compiled programs that tests share: the same one is found again, and never another one."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import monitoring
from jax._src import compilation_cache

from tests.programs import Programs

LEAST = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(compilation_cache, "_cache", Programs(tmp_path))
    for name in ("initialized", "checked", "used"):
        monkeypatch.setattr(compilation_cache, f"_cache_{name}", True)
    least = jax.config.values[LEAST]
    jax.config.update(LEAST, 0.0)
    yield tmp_path
    jax.config.update(LEAST, least)


@pytest.fixture
def found() -> Iterator[list[str]]:
    """An entry for each program that was there."""
    events: list[str] = []

    def hear(event: str, **of: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            events.append(event)

    monitoring.register_event_listener(hear)
    yield events
    monitoring.unregister_event_listener(hear)


def power(x: np.ndarray, exponent: int) -> list[int]:
    """By a program made anew; JAX remembers none of the functions before."""
    return jax.jit(lambda x: x**exponent)(x).tolist()


def test_a_program_is_found_again_and_another_is_not(folder: Path, found: list[str]) -> None:
    x = np.arange(4)
    assert power(x, 2) == [0, 1, 4, 9] and not found
    assert power(x, 2) == [0, 1, 4, 9] and len(found) == 1
    assert power(x, 3) == [0, 1, 8, 27] and len(found) == 1
    assert power(np.arange(5), 2) == [0, 1, 4, 9, 16] and len(found) == 1


@pytest.mark.parametrize("content", [b"", b"\0" * 100, None])
def test_a_damaged_file_is_compiled_again(
    folder: Path, found: list[str], content: bytes | None
) -> None:
    x = np.arange(4)
    power(x, 2)
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    assert power(x, 2) == [0, 1, 4, 9] and not found
    assert power(x, 2) == [0, 1, 4, 9] and len(found) == 1


def test_the_folder_is_bounded(folder: Path) -> None:
    for exponent in range(2, 6):
        power(np.arange(4), exponent)
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert len(sizes) == 4
    Programs(folder, sum(sizes) // 2)
    assert 0 < sum(path.stat().st_size for path in folder.iterdir()) <= sum(sizes) // 2
