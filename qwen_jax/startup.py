"""Seconds of what happens once in a process before there is a first token."""

import contextlib
import time
from collections.abc import Iterator

seconds: dict[str, float] = {}
"""Of each stage, when it was last gone through."""


@contextlib.contextmanager
def timed(stage: str) -> Iterator[None]:
    """Measures what is inside."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
