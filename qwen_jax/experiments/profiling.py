"""`--profile`: a trace of a point, and the operations in it that took longest."""

import collections
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

SLOWEST = 10
_AROUND_OTHERS = ("while", "conditional", "call")
"""Operations whose time is that of the operations in them."""


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
    """Operations of the newest trace in a folder by the seconds they took in all, most first.

    An operation is XLA's, named after its program: `step: fusion.26`. What XLA's compiler
    and runtime do is not counted.
    """
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        return []
    seconds: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for plane in ProfileData.from_file(str(traces[-1])).planes:
        for line in plane.lines:
            # An accelerator's other lines show the same time again, by operation and by module.
            if plane.name.startswith("/device:") and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" not in stats or event.name.startswith(_AROUND_OTHERS):
                    continue
                module = str(stats.get("hlo_module", "")).removeprefix("jit_")
                name = f"{module}: {event.name}"
                seconds[name] += event.duration_ns / 1e9
                calls[name] += 1
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
