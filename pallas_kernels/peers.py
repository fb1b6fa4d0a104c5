"""Whether kernels can store into the memory of the mesh's other devices.

Mosaic has XLA tell each kernel where its arguments and results lie on the other devices of the
program, in one process, over peer access. NVSHMEM and NVLink multicast are not used.
"""

import os

import jax

NVSHMEM = "xla_gpu_experimental_enable_nvshmem"


def refusal(devices: int) -> str | None:
    """Why kernels of so many devices can't reach each other's memory, or None where they can.

    That the mesh is made of the first so many is for the caller to see to: Mosaic numbers devices
    as JAX does.
    """
    if devices == 1:
        return "there is one device"
    if (processes := jax.process_count()) > 1:
        return f"the devices belong to {processes} processes"
    flags = os.environ.get("XLA_FLAGS", "")
    if NVSHMEM in flags and f"{NVSHMEM}=false" not in flags:
        return f"XLA_FLAGS has {NVSHMEM}, which is for one device a process"
    return None
