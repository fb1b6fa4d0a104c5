"""How the laboratory's NumPy is spread over threads, in one place.

NumPy computes elementwise on one thread and writes every step of an expression to memory. It lets
go of the interpreter meanwhile, so parts that fit a core's cache go to a thread for every core.
Products of matrices are not spread here: BLAS has threads of its own.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from jaxtyping import Float

T = TypeVar("T")
R = TypeVar("R")

VALUES = 1 << 15
"""Of a part: 256 KB in float64, so that an expression's few arrays stay in a core's cache."""

_NAME = "accuracy"


def each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`function` of every item, in their order; on this thread where it is one of ours already."""
    known = list(items)
    if len(known) < 2 or threading.current_thread().name.startswith(_NAME):
        return [function(item) for item in known]
    return list(_pool().map(function, known))


def parts(rows: int, width: int) -> list[slice]:
    """So many rows of so many values, in parts of `VALUES`, or of a row where that has more."""
    step = max(VALUES // max(width, 1), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def rowwise(
    function: Callable[..., Float[np.ndarray, "rows ..."]],
    *arrays: Float[np.ndarray, "rows ..."] | float,
) -> Float[np.ndarray, "rows ..."]:
    """A function of arrays that is taken row by row, some rows at a time.

    Args:
        function: its result has the shape of the first array and is float64.
        arrays: all have as many rows as the first; numbers are the same for every row.
    """
    first = np.asarray(arrays[0])
    out = np.empty(first.shape)

    def some(rows: slice) -> None:
        with np.errstate(all="ignore"):  # each thread has its own; infinities are data here
            out[rows] = function(*(a[rows] if isinstance(a, np.ndarray) else a for a in arrays))

    each(some, parts(len(first), first[:1].size))
    return out


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=_NAME)
