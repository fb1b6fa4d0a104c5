"""Where compiled programs are kept between processes."""

import os
import warnings
from pathlib import Path

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
        cache = home / "qwen_jax" / "xla"
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(f"{cache} can't be written")
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home.
        logging.warning("Compiled programs are not kept: %s; set XDG_CACHE_HOME.", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))
    # A damaged entry is one that isn't there: its program is compiled.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    keep_in(cache / "executables")
    # All of them: even a copy takes XLA 50 ms for a GPU, and loading has dozens of small programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
