"""A function of NumPy in a process of its own.

Whoever traces programs keeps Python's interpreter to himself for seconds, and NumPy's threads wait
for it before every step: another process has another one. Both see arrays of `SharedArrays`.
"""

import contextlib
import functools
import importlib
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, ParamSpec, Self, TypeVar

import numpy as np
from jaxtyping import Shaped

from qwen_jax.accuracy.finding import Progress
from qwen_jax.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

Places = dict[str, tuple[np.dtype, tuple[int, ...], int]]
"""Of arrays by name: what they are, and how many bytes from the beginning."""

_ALIGNED = 64
"""Bytes: where an array may begin."""


class SharedArrays(Mapping[str, Shaped[np.ndarray, "..."]]):
    """Read-only arrays by name, in memory that a child process may see as well."""

    def __init__(self, file: int | None = None, places: "Places | None" = None):
        self.file = _memory() if file is None else file
        weakref.finalize(self, os.close, self.file)
        self._places = places or {}

    def take(self, arrays: dict[str, Any]) -> Self:
        """Takes arrays, of NumPy or JAX, out of a dict, so that none is held twice for long."""
        end = 0
        with os.fdopen(os.dup(self.file), "wb") as file:
            for name in list(arrays):
                array = np.ascontiguousarray(arrays.pop(name))
                self._places[name] = array.dtype, array.shape, end
                file.seek(end)
                file.write(array.reshape(-1).view(np.uint8).data)
                end += -(-array.nbytes // _ALIGNED) * _ALIGNED
            file.truncate(end or _ALIGNED)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A child is told where they lie."""
        return SharedArrays, (self.file, self._places)

    @functools.cached_property
    def _map(self) -> mmap.mmap:
        return mmap.mmap(self.file, 0, access=mmap.ACCESS_READ)

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        dtype, shape, start = self._places[name]
        return np.frombuffer(self._map, dtype, int(np.prod(shape)), start).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Child(Generic[P, R]):
    """A process that will call one function of a module, and meanwhile imports it.

    It ends with this one, however this one ends.

    Args:
        shared: what its arguments may hold.
    """

    def __init__(self, function: Callable[P, R], shared: SharedArrays | None = None):
        self.function, self._made = function, os.fdopen(_memory(), "w+b")
        files = [self._made.fileno(), *([] if shared is None else [shared.file])]
        path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, function.__module__, str(files[0])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=files,
            env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            start_new_session=True,  # Ctrl-C is for this process, whose end is the child's
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result. `progress` among the arguments is called here.

        Raises:
            UserError: the process ended before it had one.
            Exception: what the function raised.
        """
        given, told = self._process.stdin, self._process.stdout
        assert given is not None and told is not None
        progress: Progress | None = kwargs.pop("progress", None)  # type: ignore[assignment]
        with self._made, told, given:
            with contextlib.suppress(BrokenPipeError):
                pickle.dump((self.function, args, kwargs), given)
                given.flush()
            for line in told:
                done, total = map(int, line.split())
                if progress:
                    progress(done, total)
            if code := self._process.wait():
                raise UserError(
                    f"the process that ran {self.function.__name__} ended with the code {code}; "
                    "free some memory, or see what it said."
                )
            self._made.seek(0)
            result, error = pickle.load(self._made)
        if error is not None:
            raise error
        made: R = result
        return made


def _memory() -> int:
    """A file that lies in memory, where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("arrays")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def main(module: str, file: str) -> None:
    """The child: imports the module, waits for the call, and leaves result and error in a file."""

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    importlib.import_module(module)
    try:
        function, args, kwargs = pickle.load(sys.stdin.buffer)
    except EOFError:  # it has ended before it called
        return

    threading.Thread(target=end_with_parent, daemon=True).start()
    result, error = None, None
    try:
        result = function(*args, **kwargs, progress=lambda *n: print(*n, flush=True))
    except Exception as raised:  # for the parent to raise
        error = raised
    with os.fdopen(int(file), "wb") as made:
        pickle.dump((result, error), made, protocol=5)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
