"""Whether kernels can store into the memory of the mesh's other devices.

Mosaic has XLA tell each kernel where its arguments and results lie on the other devices of the
program, in one process, over peer access. NVSHMEM and NVLink multicast are not used.
"""

import ctypes
import functools
import itertools
import os
from collections.abc import Sequence

import jax

NVSHMEM = "xla_gpu_experimental_enable_nvshmem"


def refusal(devices: Sequence[int]) -> str | None:
    """Why kernels can't reach the memory of the mesh's other devices, or None where they can.

    Args:
        devices: the mesh's, by their numbers in JAX, which Mosaic's places in the mesh have to be.
    """
    if len(devices) == 1:
        return "there is one device"
    if [*devices] != [*range(len(devices))]:
        return (
            f"the devices are {', '.join(map(str, devices))} of JAX's, not its first ones in order"
        )
    if (processes := jax.process_count()) > 1:
        return f"the devices belong to {processes} processes"
    flags = os.environ.get("XLA_FLAGS", "")
    if NVSHMEM in flags and f"{NVSHMEM}=false" not in flags:
        return f"XLA_FLAGS has {NVSHMEM}, which is for one device a process"
    if (pair := _apart(len(devices))) is not None:
        return "CUDA says that GPU {} can't reach the memory of GPU {}".format(*pair)
    return None


@functools.cache
def _apart(count: int) -> tuple[int, int] | None:
    """Two of the first GPUs that can't reach each other's memory, as CUDA says; None also where it
    doesn't know so many, as on a machine that plans for another."""
    if jax.devices()[0].platform not in ("gpu", "cuda"):
        return None
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    for pair in itertools.permutations(range(count), 2):
        can = ctypes.c_int(1)
        failed = cuda.cuDeviceCanAccessPeer(ctypes.byref(can), *pair)
        if not failed and not can.value:
            return pair
    return None
