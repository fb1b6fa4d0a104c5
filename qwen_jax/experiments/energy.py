"""What tokens take of energy, by the counters of NVIDIA's management library (NVML), of which the
extra `energy` has the bindings. Where there is none, as on a CPU, nothing is measured, or shown.

A counter is of a whole GPU since its driver was loaded: what is idle in it and what another process
does there is in the number.
"""

import os
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import jax

from qwen_jax.engine.engine import Engine

METRIC = "joules_per_token"


class Meter:
    """Joules of some GPUs.

    Args:
        nvml: the library's bindings, initialised.
        handles: its names for the GPUs.
    """

    def __init__(self, nvml: ModuleType, handles: Sequence[Any]):
        self._nvml, self._handles = nvml, handles
        self._tokens, self._start = 0, self._joules()

    @property
    def counts(self) -> bool:
        """Whether the GPUs have said how much it was when this began."""
        return self._start is not None

    def restart(self, tokens: int = 0) -> None:
        """From now on, where so many tokens are there already."""
        self._tokens, self._start = tokens, self._joules()

    def per_token(self, tokens: int) -> float | None:
        """Joules a token since then, where there are so many tokens now; None where none has come,
        or a counter can't be read any more."""
        end, new = self._joules(), tokens - self._tokens
        if end is None or self._start is None or new <= 0:
            return None
        return (end - self._start) / new

    def _joules(self) -> float | None:
        try:
            read = self._nvml.nvmlDeviceGetTotalEnergyConsumption
            return sum(read(handle) for handle in self._handles) / 1e3
        except self._nvml.NVMLError:
            return None


def meter(devices: Iterable[jax.Device]) -> Meter | None:
    """Of the GPUs that JAX knows as these devices; None where they are none, there is no NVML, it
    can't tell which they are, or they count no energy."""
    gpus = sorted(d.local_hardware_id for d in devices if d.platform in ("gpu", "cuda"))
    if not gpus:
        return None
    try:
        import pynvml as nvml
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        found = Meter(nvml, [_handle(nvml, index) for index in gpus])
    except (nvml.NVMLError, ValueError, IndexError):
        return None
    return found if found.counts else None


def of_engine(engine: Engine) -> Meter | None:
    """Of all the devices that have the engine's model."""
    return meter({d for one in (engine, *engine.others) for d in one.weights.devices()})


def _handle(nvml: ModuleType, index: int) -> Any:
    """NVML's of the GPU that CUDA counts so. Raises ValueError where it may count otherwise."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = visible.split(",")[index].strip() if visible else str(index)
    if not name.isdigit():
        return nvml.nvmlDeviceGetHandleByUUID(name)
    handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
    kinds = {nvml.nvmlDeviceGetName(handle) for handle in handles}
    if len(kinds) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        raise ValueError("CUDA puts the fastest GPU first, NVML the one on the first slot")
    return nvml.nvmlDeviceGetHandleByIndex(int(name))
