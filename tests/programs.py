"""What XLA has compiled for one test is there for all: of every worker, and of the next run.

It is found by JAX's own key, which is made of all that decides a program: what was lowered, so that
a test that changes code under an engine gets its own, versions, flags and kind of machine.
"""

import hashlib
from pathlib import Path

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from qwen_jax.executables import identity
from qwen_jax.executables.store import Store

LIMIT = 1 << 28
"""Bytes of the folder. The programs of all tests take 45 MB."""

LEAST = 0.05
"""Seconds that a program must take to compile to be kept: there are as many again that don't, and
it would cost as much to write them as it saves."""


class Programs(Store, CacheInterface):
    """JAX's interface to a folder whose files are written whole, and checked when they are read.
    JAX's own writes in place, and our workers read at the same time."""

    def __init__(self, folder: Path, limit: int = LIMIT):
        super().__init__(folder, limit)
        self._path = folder
        if folder.exists():
            super()._make_room()

    def _make_room(self) -> None:
        """Not with every program: to look at all files takes as long as to compile one."""


def share(folder: Path) -> None:
    """From now on this process takes its programs from the folder, and leaves them there.

    JAX's settings stay as they are, by which the engine sees that it is to keep nothing: it goes
    by sources on disk, not by what a test has put in their place.
    """
    machine = identity._machine(jax.local_devices()[0])  # JAX's key has no more than its kind
    # JAX looks at its settings once, and then at these.
    compilation_cache.reset_cache()
    compilation_cache._cache = Programs(folder / hashlib.sha256(machine.encode()).hexdigest()[:16])
    compilation_cache._cache_initialized = True
    compilation_cache._cache_checked = compilation_cache._cache_used = True
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST)
