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
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NoReturn, ParamSpec, Self, TypeVar

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

    def __init__(self, file: int | None = None, places: Places | None = None):
        self.file = _memory() if file is None else file
        weakref.finalize(self, os.close, self.file)
        self._places = places or {}

    def take(self, arrays: dict[str, Any]) -> Self:
        """Takes arrays, of NumPy or JAX, out of a dict, so that none is held twice for long.

        Raises:
            UserError: there is no memory for them.
        """
        end = 0
        with _out_of_memory("share the parameters"), os.fdopen(os.dup(self.file), "wb") as file:
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
        return _seen, (self.file, self._places)

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


@contextlib.contextmanager
def _out_of_memory(to: str) -> Iterator[None]:
    """The system says so as of a file that has no name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(f"can't {to} with another process: {error}; free some memory.") from None


def _seen(file: int, places: Places) -> SharedArrays:
    return SharedArrays(os.dup(file), places)


class Child(Generic[P, R]):
    """A process that will call one function of a module once, and meanwhile imports it.

    It ends with this one, however this one ends.

    Args:
        shared: what its arguments may hold.

    Raises:
        UserError: the system can't start one.
    """

    def __init__(self, function: Callable[P, R], shared: SharedArrays | None = None):
        self.function, self._made = function, os.fdopen(_memory(), "w+b")
        files = [self._made.fileno(), *([] if shared is None else [shared.file])]
        call = f"from {__name__} import main; main({function.__module__!r}, {files[0]})"
        with _out_of_memory("share the work"):
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {call}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=files,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
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
        try:
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
        finally:
            self.end()
        if error is not None:
            with _out_of_memory("share the work"):
                raise error
        made: R = result
        return made

    def end(self) -> None:
        """Ends it, whatever it is at."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._made):
            assert file is not None
            with contextlib.suppress(BrokenPipeError):  # of a call that it never read
                file.close()


def _memory() -> int:
    """A file that lies in memory, where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("arrays")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def main(module: str, file: int) -> NoReturn:
    """The child: imports the module, waits for the call, and leaves result and error in a file."""
    progress = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints

    def tell(done: int, total: int) -> None:
        print(done, total, file=progress, flush=True)

    with os.fdopen(file, "wb") as made:
        try:
            importlib.import_module(module)
            function, args, kwargs = _call()
            threading.Thread(target=_end_with_parent, daemon=True).start()
            pickle.dump((function(*args, **kwargs, progress=tell), None), made, protocol=5)
        except Exception as error:  # for the parent to raise
            made.seek(0)
            made.write(pickle.dumps((None, _sendable(error))))
    os._exit(0)


def _call() -> Any:
    """What to call. Ends the process where nobody calls."""
    try:
        return pickle.load(sys.stdin.buffer)
    except EOFError:
        os._exit(0)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _sendable(error: Exception) -> Exception:
    """The error, with where it was raised if it is nobody's but ours."""
    where = traceback.format_exc()
    if not isinstance(error, UserError):
        error.add_note(where)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception that can't be made again
        return RuntimeError(where)
    return error
