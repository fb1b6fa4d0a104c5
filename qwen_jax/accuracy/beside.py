"""What a device computes while the laboratory's NumPy works on the host."""

import functools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, Self, TypeVar

from qwen_jax.accuracy.child import Child, SharedArrays
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.weights import read_back
from qwen_jax.model.split import WHOLE
from qwen_jax.model.tap import watched

P = ParamSpec("P")
R = TypeVar("R")

AT_ONCE = 8
"""A GPU's programs take seconds to compile, each on a core or two; results wait in memory."""


class Beside:
    """An engine's work, a few pieces at a time on threads, in the order in which they are begun.

    Where the device is the host itself, a piece is done when its result is asked for: cores and
    memory are those that NumPy wants. So it is on several devices, which would wait for each other
    for ever if each were given programs in an order of its own, and where something watches or
    intervenes, which follows one trace at a time.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        apart = engine.shapes.ahead and engine.spec.split is WHOLE and not watched()
        self._pool = ThreadPoolExecutor(AT_ONCE, "device") if apart else None
        self._shared = SharedArrays() if apart else None
        self._children: list[Child[..., Any]] = []
        self._parameters: Mapping[str, Any] | None = None
        self._lock = threading.Lock()

    @property
    def apart(self) -> bool:
        """Whether the device works while the host does."""
        return self._pool is not None

    def begin(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Callable[[], R]:
        """Calls `function`, and returns what gives its result, to be called once."""
        if self._pool is None:
            return functools.partial(function, *args, **kwargs)
        return self._pool.submit(function, *args, **kwargs).result

    def elsewhere(self, function: Callable[P, R]) -> Callable[P, R]:
        """A function of NumPy that may be given `parameters`, to be called once; of a device apart
        in another process, so that it and the device's programs, which are traced here, don't wait
        for one interpreter.
        """
        if self._shared is None:
            return function
        child = Child(function, self._shared)
        self._children.append(child)
        return child

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The engine's by name; of a device apart read back once, by whoever asks first."""
        if self._shared is None:
            return read_back(self.engine.weights)
        with self._lock:
            if self._parameters is None:
                # Apart from the engine's own arrays, which would keep what is copied to the host.
                held = read_back(self.engine.weights).items()
                self._parameters = self._shared.take({n: x.addressable_data(0) for n, x in held})
            return self._parameters

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:  # Ctrl-C doesn't wait for a program to compile
            if kind is not None:
                self._end()
            self._pool.shutdown(wait=kind is None, cancel_futures=True)
            self._end()

    def _end(self) -> None:
        for child in self._children:
            child.end()
        self._parameters = self._shared = None
