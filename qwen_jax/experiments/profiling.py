"""`--profile`: a trace of a point, and the operations in it that took longest."""

import collections
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

SLOWEST = 10
_NO_OPERATION = ("ThunkExecutor", "Thread", "$", "end: ", "wait for ")
"""How events begin that are the runtime at work, and no operation of a program."""


@contextlib.contextmanager
def traced(directory: Path, point: str, wanted: bool) -> Iterator[list[dict[str, Any]]]:
    """Traces what runs inside, if wanted; afterwards the list holds the slowest operations."""
    found: list[dict[str, Any]] = []
    if not wanted:
        yield found
        return
    folder = directory / "profiles" / point
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would be most of the trace.
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield found
    found += slowest(folder)


def slowest(folder: Path) -> list[dict[str, Any]]:
    """Operations of the newest trace in a folder by the seconds they took in all, most first."""
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        return []
    seconds: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for plane in ProfileData.from_file(str(traces[-1])).planes:
        for line in plane.lines:
            if not _holds_operations(plane.name, line.name):
                continue
            for event in line.events:
                if event.name.startswith(_NO_OPERATION) or "::" in event.name:
                    continue
                seconds[event.name] += event.duration_ns / 1e9
                calls[event.name] += 1
    total = sum(seconds.values())
    return [
        {
            "operation": name,
            "seconds": round(spent, 6),
            "share": round(spent / total, 4),
            "calls": calls[name],
        }
        for name, spent in seconds.most_common(SLOWEST)
    ]


def _holds_operations(plane: str, line: str) -> bool:
    """An accelerator's plane has a line for its operations, the host's one a compute thread."""
    if plane.startswith("/device:"):
        return "Ops" in line
    return plane == "/host:CPU" and ("Eigen" in line or "XLA" in line or "cpu" in line.lower())
