"""What a run takes of the machine: memory before it starts, seconds of compilation, peak memory."""

import dataclasses
import os
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.executables.kept import LOADED
from qwen_jax.model.cache import PAGE, bytes_per_token, pages_for

_WORKSPACE = 2 << 30
"""Bytes of an accelerator that programs need beside weights and cache."""

_total = 0.0


class TooLarge(UserError):
    """What is asked for takes more memory than the device has free."""


def _add(event: str, duration_secs: float, **kwargs: str | int) -> None:
    # Tracing, lowering and compiling; a hit in the persistent cache counts its retrieval.
    global _total
    if event.startswith("/jax/core/compile/") or event == LOADED:
        _total += duration_secs


jax.monitoring.register_event_duration_secs_listener(_add)


def compile_seconds() -> float:
    """Seconds this process has spent tracing, lowering and compiling so far."""
    return _total


def device() -> jax.Device:
    """The device that everything runs on. Raises UserError where JAX finds none."""
    try:
        return jax.local_devices()[0]
    except (RuntimeError, AssertionError) as error:  # an assertion where the plugin is missing
        reason = (str(error).splitlines() or ["its plugin is not installed"])[0]
        raise UserError(
            f"JAX cannot use the platform in JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: "
            f"{reason}"
        ) from error


def peak_memory() -> tuple[str, int]:
    """Peak bytes in use and where: on the accelerator, or of the whole process on a CPU."""
    stats = device().memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return device().device_kind, stats["peak_bytes_in_use"]
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return "host", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory() -> int:
    """Bytes an accelerator's allocator may still take, or the host's available memory."""
    stats = device().memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a model takes of the device's memory, in bytes; activations, which are small, apart."""

    weights: int
    cache_per_token: int
    free: int

    @classmethod
    def of(
        cls, config: ModelConfig, dtype: jnp.dtype, held: int | None = None, sharers: int = 1
    ) -> "Budget":
        """For parameters and a cache in `dtype`; norms stay float32.

        Args:
            held: what the parameters take where they are not all in `dtype`.
            sharers: devices that take as much, which on a CPU have one memory.
        """
        weights = weight_bytes(config, dtype)
        each = bytes_per_token(config, dtype.itemsize)
        free = free_memory()
        if device().platform == "cpu":
            free //= sharers
        return cls(weights if held is None else held, each, free)


def weight_bytes(config: ModelConfig, dtype: jnp.dtype) -> int:
    """What parameters take in `dtype`; norms stay float32."""
    norms = (2 * config.num_layers + 1) * config.hidden_size
    return (config.num_parameters - norms) * dtype.itemsize + norms * 4


def packs(expanded: Budget, packed: int) -> bool:
    """Whether matrices stay in blocks where nobody says: if the weights would else take more than
    three quarters of what is free. Numbers are faster, but other programs want memory too."""
    return packed < expanded.weights and expanded.weights > expanded.free * 3 // 4


def check_weights_fit(
    config: ModelConfig, dtype: jnp.dtype, held: int | None = None, sharers: int = 1
) -> None:
    """Raises UserError where the weights alone are more than the device has free: see `Budget`."""
    budget = Budget.of(config, dtype, held, sharers)
    if budget.weights > budget.free:
        smaller = "dtype bfloat16, " if dtype.itemsize > 2 and held is None else ""
        form = f"in {dtype.name}" if held is None else "in their blocks"
        raise TooLarge(
            f"{config.source}: its weights take {show_bytes(budget.weights)} {form}, but "
            f"the {device().device_kind} has {show_bytes(budget.free)} free; choose {smaller}a "
            "smaller model or a larger machine."
        )


def pool_pages(
    config: ModelConfig, cache: jnp.dtype, texts: int, platform: str, free: int, beside: int = 0
) -> int:
    """Pages for so many texts at a time: one as long as the context, or 8,192 tokens of each (of a
    CPU's shared memory 1,024), or what there is room for; texts that need more wait for each other.

    An accelerator gives three tenths of what the weights leave: a program holds the pool once, but
    XLA counts it three times, as argument, as result and in a loop, when it looks whether programs
    fit. A CPU gives half of what is free. An H200 takes 20 ms to give out a gigabyte.
    A size has four significant bits, so that the next process finds its programs compiled.

    Args:
        cache: dtype of keys and values.
        free: bytes that there are for it.
        beside: bytes that a token takes in a second cache of as many pages.

    Raises:
        UserError: there is no room for one page.
    """
    context = pages_for(config.context_length)
    each, room = (1024, free // 2) if platform == "cpu" else (8192, (free - _WORKSPACE) * 3 // 10)
    wanted = min(max(context, texts * pages_for(each)), texts * context)
    fits = room // (PAGE * (bytes_per_token(config, cache.itemsize) + beside))
    if fits < 1:
        raise TooLarge(
            f"There is no room for keys and values: {config.source} leaves "
            f"{show_bytes(max(free, 0))} free on the {device().device_kind}; choose a smaller "
            "model or a larger machine."
        )
    if fits >= wanted:
        return wanted
    unit = 1 << max(fits.bit_length() - 4, 0)
    return fits // unit * unit


def show_bytes(count: float) -> str:
    """A number of bytes for people, as in 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
