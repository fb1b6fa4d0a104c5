"""What a run cost: seconds of compilation and peak memory, as JAX and the system report them."""

import os
import resource
import sys
from pathlib import Path

import jax

_total = 0.0


def _add(event: str, duration_secs: float, **kwargs: str | int) -> None:
    # Tracing, lowering and compiling; a hit in the persistent cache counts its retrieval.
    global _total
    if event.startswith("/jax/core/compile/"):
        _total += duration_secs


jax.monitoring.register_event_duration_secs_listener(_add)


def compile_seconds() -> float:
    """Seconds this process has spent tracing, lowering and compiling so far."""
    return _total


def peak_memory() -> tuple[str, int]:
    """Peak bytes in use and where: on the accelerator, or of the whole process on a CPU."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return device.device_kind, stats["peak_bytes_in_use"]
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return "host", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> int:
    """Bytes an accelerator's allocator may still take, or the host's available memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
