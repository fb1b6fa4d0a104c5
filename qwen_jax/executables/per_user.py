"""Where compiled programs are kept between processes."""

import contextlib
import glob
import os
import re
import warnings
from pathlib import Path
from typing import Any

import jax
from absl import logging

from qwen_jax.executables.kept import keep_in


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, per user, unless JAX was told otherwise.

    JAX's own cache saves XLA's part of compiling; what we call most is kept whole, beside it.
    """
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"]:
        keep_in(None)
        return
    if chosen := settings["jax_compilation_cache_dir"]:
        keep_in(None if "://" in chosen else Path(chosen) / "executables")
        return
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        if not home.is_absolute():  # Invalid by XDG's specification: caches would lie about.
            logging.warning("XDG_CACHE_HOME=%s is left out: it must be an absolute path.", home)
            home = Path.home() / ".cache"
        cache = home / "qwen_jax" / "xla"
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(f"{cache} can't be written")
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home.
        logging.warning("Compiled programs are not kept: %s; set XDG_CACHE_HOME.", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")
    _repair(cache)
    keep_in(cache / "executables")
    # All of them: even a copy takes XLA 50 ms for a GPU, and loading has dozens of small programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _repair(cache: Path) -> None:
    """Has entries removed that JAX can't read. It compiles their programs and keeps what it has,
    so that a file that was cut would cost every process the time to compile.

    JAX tells of one in a warning alone, which names the program; other entries of that program go,
    too, and come back.
    """
    shown = warnings.showwarning

    def remove(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        found = _DAMAGED.match(str(message))
        if found is None:
            shown(message, *args, **kwargs)
            return
        for entry in cache.glob(f"{glob.escape(found[1])}-*-cache"):
            logging.debug("%s is damaged: %s", entry, message)
            with contextlib.suppress(OSError):
                entry.unlink()

    if getattr(shown, "__qualname__", "") != remove.__qualname__:
        warnings.filterwarnings("always", _DAMAGED.pattern)
        warnings.showwarning = remove


_DAMAGED = re.compile("Error reading persistent compilation cache entry for '(.*?)'")
