"""`--profile`: a trace of a point, and the model's operations in it that took longest."""

import collections
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from qwen_jax.experiments import model_operations

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
    # Else JAX's cache gives a program whose operations have the names of older sources.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    folder = directory / "profiles" / point
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls would be most of the trace.
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield found
    found += slowest(folder)


def slowest(folder: Path) -> list[dict[str, Any]]:
    """Operations of the newest trace in a folder by the seconds they took in all, most first.

    An operation is the model's, named after its program: `step: qkv_proj`. How many of XLA's it is
    made of, is `calls`. What XLA's compiler and runtime do is not counted.
    """
    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        return []
    events = list(_events(traces[-1]))
    seen: dict[str, set[str]] = collections.defaultdict(set)
    for module, event, _ in events:
        seen[module].add(event)
    known = model_operations.of_programs(seen)
    seconds: dict[str, float] = collections.defaultdict(float)
    calls: collections.Counter[str] = collections.Counter()
    for module, event, spent in events:
        where = known.get((module, event), model_operations.ELSEWHERE)
        name = f"{module.removeprefix('jit_')}: {where}"
        seconds[name] += spent
        calls[name] += 1
    total = sum(seconds.values())
    return [
        {
            "operation": name,
            "seconds": round(spent, 6),
            "share": round(spent / total, 4),
            "calls": calls[name],
        }
        for name, spent in sorted(seconds.items(), key=lambda item: -item[1])[:SLOWEST]
    ]


def _events(trace: Path) -> Iterator[tuple[str, str, float]]:
    """Program, XLA's operation and seconds of all that ran."""
    for plane in ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            # An accelerator's other lines show the same time again, by operation and by module.
            if plane.name.startswith("/device:") and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and not event.name.startswith(_AROUND_OTHERS):
                    module = str(stats.get("hlo_module", ""))
                    yield module, str(stats["hlo_op"]), event.duration_ns / 1e9
