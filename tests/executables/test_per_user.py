"""Where programs are kept, and what is said where they can't be."""

import os
from pathlib import Path

import jax
import pytest

from qwen_jax.executables import per_user


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache, and JAX's settings as they were before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = dict(jax.config.values)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    for name in (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    ):
        jax.config.update(name, before[name])
    per_user.keep_in(None)


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
