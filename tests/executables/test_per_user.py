"""Where programs are kept, and what is said where they can't be."""

import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from qwen_jax.executables import per_user


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache, and JAX's settings as they were before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before, shown = dict(jax.config.values), warnings.showwarning
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    compilation_cache.reset_cache()
    for name in (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    ):
        jax.config.update(name, before[name])
    per_user.keep_in(None)
    warnings.showwarning = shown


def test_a_folder_of_the_users(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    per_user.use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] == str(home / "qwen_jax" / "xla")
    assert not caplog.messages


def test_one_that_cannot_be_written_is_told_once(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "qwen_jax" / "xla").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    per_user.use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    (message,) = caplog.messages
    assert message.startswith("Compiled programs are not kept:") and "can't be written" in message


def test_a_relative_one_is_left_out(
    home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(home / "home"))
    per_user.use_compilation_cache()
    (message,) = caplog.messages
    assert message == "XDG_CACHE_HOME=here is left out: it must be an absolute path."
    assert not (home / "here").exists() and (home / "home" / ".cache" / "qwen_jax").is_dir()


@pytest.mark.parametrize("left", [0, 100])
def test_an_entry_that_was_cut_is_written_again(home: Path, left: int) -> None:
    """JAX alone would meet it again in every process."""
    with warnings.catch_warnings():  # pytest shows them in its own way
        per_user.use_compilation_cache()
        per_user.use_compilation_cache()

        def run() -> Path:
            jax.clear_caches()
            jax.jit(damaged_and_repaired)(jnp.ones(7))
            (entry,) = (home / "qwen_jax" / "xla").glob("jit_damaged_and_repaired-*-cache")
            return entry

        compilation_cache.reset_cache()
        whole = run().read_bytes()
        run().write_bytes(whole[:left])
        repaired = run().stat()
        assert repaired.st_size > 1000
        assert run().stat().st_mtime_ns == repaired.st_mtime_ns


def damaged_and_repaired(x: jax.Array) -> jax.Array:
    return x * 3
