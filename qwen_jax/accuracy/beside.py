"""What a device computes while the laboratory's NumPy works on the host."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, Self, TypeVar

from qwen_jax.engine.engine import Engine
from qwen_jax.model.split import WHOLE
from qwen_jax.model.tap import watched

P = ParamSpec("P")
R = TypeVar("R")

AT_ONCE = 4
"""A GPU's programs take seconds to compile, each on some cores; results wait in memory."""


class Beside:
    """An engine's work, a few pieces at a time on threads, in the order in which they are begun.

    Where the device is the host itself, a piece is done when its result is asked for: cores and
    memory are those that NumPy wants. So it is on several devices, which would wait for each other
    for ever if each were given programs in an order of its own, and where something watches or
    intervenes, which follows one trace at a time.
    """

    def __init__(self, engine: Engine):
        apart = engine.shapes.ahead and engine.spec.split is WHOLE and not watched()
        self._pool = ThreadPoolExecutor(AT_ONCE, "device") if apart else None

    @property
    def apart(self) -> bool:
        """Whether the device works while the host does."""
        return self._pool is not None

    def begin(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Callable[[], R]:
        """Calls `function`, and returns what gives its result, to be called once."""
        if self._pool is None:
            return functools.partial(function, *args, **kwargs)
        return self._pool.submit(function, *args, **kwargs).result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:  # Ctrl-C doesn't wait for a program to compile
            self._pool.shutdown(wait=kind is None, cancel_futures=True)
