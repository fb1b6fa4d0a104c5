"""How the laboratory's NumPy is spread over threads, in one place.

NumPy computes elementwise on one thread, and lets go of the interpreter meanwhile: so parts of a
work go to a thread for every core, each from beginning to end. BLAS stays on the thread that calls
it: its own threads would wait for more work on the cores that ours want.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from threadpoolctl import ThreadpoolController

T = TypeVar("T")
R = TypeVar("R")

VALUES = 1 << 18
"""Of a part at most: 2 MB in float64, so that an expression's few arrays stay near a core."""

FEWEST = 1 << 16
"""Of a part at least: each of its steps takes long enough for threads not to queue for the
interpreter."""

TURN = 5e-4
"""Seconds for which another thread that runs Python, such as one that traces, keeps the interpreter
from ours, which ask for it before every step of NumPy's. Python's default is ten steps long."""

CORES = os.cpu_count() or 1

_NAME = "accuracy"


def each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`function` of every item, in their order; on this thread where it is one of ours already."""
    known = list(items)
    if len(known) < 2 or threading.current_thread().name.startswith(_NAME):
        return [function(item) for item in known]
    with _ALONE:
        return list(_pool().map(function, known))


def slices(count: int, unit: int, least: int, most: int) -> list[slice]:
    """So many things in slices, one for each core, but `least` to `most` in one; multiples of
    `unit`."""
    step = min(max(-(-count // CORES), least), max(most, 1))
    step = -(-step // unit) * unit
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def parts(rows: int, width: int) -> list[slice]:
    """So many rows of so many values, in parts of `VALUES` at most or of one row; about as many for
    one core as for another."""
    if not rows:
        return [slice(0, 0)]
    most, turns = VALUES // max(width, 1), -(-rows * width // (VALUES * CORES)) or 1
    step = max(min(max(-(-rows // (turns * CORES)), FEWEST // max(width, 1)), most), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def gathered(
    function: Callable[[T], tuple[Float[np.ndarray, "..."], ...]],
    items: Sequence[T],
    places: Sequence[slice],
    axis: int = 0,
) -> tuple[Float[np.ndarray, "..."], ...]:
    """The arrays that `function` makes of each item, put together along an axis: each as soon as it
    is made, so that it lives no longer. New memory is slow.

    Args:
        places: of each item's arrays in the whole ones, in order.
    """
    if len(items) == 1:
        return function(items[0])
    whole: list[np.ndarray] = []
    lock = threading.Lock()

    def put(number: int) -> None:
        made = function(items[number])
        with lock:
            if not whole:
                whole.extend(np.empty(_longer(x.shape, axis, places[-1].stop)) for x in made)
        for out, part in zip(whole, made, strict=True):
            out[(slice(None),) * axis + (places[number],)] = part

    each(put, range(len(items)))
    return tuple(whole)


def _longer(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return *shape[:axis], length, *shape[axis + 1 :]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CORES, thread_name_prefix=_NAME)


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


class _Alone:
    """BLAS on the thread that calls it, and others' short turns, as long as anybody is inside.

    BLAS's limit is the process's, and only who has set it can lift it: so that one thread does
    both, whoever comes first and goes last.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._turn = sys.getswitchinterval()
        self._keeper = ThreadPoolExecutor(1, "blas")

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limit = self._keeper.submit(self._limited).result()
                self._turn = sys.getswitchinterval()
                sys.setswitchinterval(min(TURN, self._turn))
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                sys.setswitchinterval(self._turn)
                self._keeper.submit(self._limit.__exit__, None, None, None).result()

    @staticmethod
    def _limited() -> Any:
        limit = _libraries().limit(limits=1, user_api="blas")
        limit.__enter__()
        return limit


_ALONE = _Alone()
