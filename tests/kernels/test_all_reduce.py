"""The exchange of few rows without GPUs: it lowers for two and four, or says why not."""

import ctypes
import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import peers
from pallas_kernels.all_reduce import all_reduce, mosaic_gpu
from tests.kernels import hopper

AXIS = "tp"


def lowered(devices: int, rows: int, width: int, dtype: str) -> str:
    """The program for so many GPUs, compiled as well where it can be."""
    found = hopper.devices(devices)
    mesh = AbstractMesh((devices,), (AXIS,)) if found is None else Mesh(np.array(found), (AXIS,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    summed = jax.shard_map(
        functools.partial(
            all_reduce, axis=AXIS, devices=range(devices), implementation="mosaic_gpu"
        ),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    x = ShapeDtypeStruct((rows, width), dtype, sharding=everywhere)
    program = jax.jit(summed).trace(x).lower(lowering_platforms=("cuda",))
    if hopper.compiles():
        program.compile()
    return program.as_text()


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
@pytest.mark.parametrize(
    ("devices", "rows", "width", "dtype"),
    [
        (2, 1, 3584, "bfloat16"),
        (2, 64, 3584, "bfloat16"),
        (4, 8, 896, "float16"),
        (8, 64, 2048, "float32"),
    ],
)
def test_lowers(devices: int, rows: int, width: int, dtype: str) -> None:
    """By stores into each other's memory, and no multicast or NVSHMEM."""
    text = lowered(devices, rows, width, dtype)
    assert text.count("@mosaic_gpu_v2") == 1
    assert "uses_xla_collective_metadata = true" in text
    assert not re.search(r"multimem_parameters|symmetric_memory_parameters|nvshmem", text)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ((1, 3584, "int32", (0, 1)), "takes bfloat16, float16, float32, not int32"),
        ((128, 3584, "float32", (0, 1)), "128 rows of 3584 are more than 1 MiB"),
        ((1, 100, "float32", (0, 1)), "1 rows of 100 numbers are not whole blocks of 128"),
        ((1, 3584, "float32", (0,)), "there is one device"),
        (
            (1, 3584, "float32", (2, 3)),
            "the devices are 2, 3 of JAX's, not its first ones in order",
        ),
    ],
)
def test_says_why_not(case: tuple[int, int, str, tuple[int, ...]], why: str) -> None:
    assert why in (mosaic_gpu.refusal(*case) or "")


def test_needs_one_process_without_nvshmem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mosaic_gpu.refusal(1, 3584, jnp.float32, (0, 1)) is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_experimental_enable_nvshmem=true")
    assert "XLA_FLAGS has" in (mosaic_gpu.refusal(1, 3584, jnp.float32, (0, 1)) or "")
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "belong to 2 processes" in (mosaic_gpu.refusal(1, 3584, jnp.float32, (0, 1)) or "")


class Cuda:
    """A driver of three GPUs, of which the last stands apart."""

    def cuDeviceCanAccessPeer(self, can: Any, device: int, peer: int) -> int:
        if max(device, peer) > 2:
            return 101  # invalid device
        can._obj.value = 2 not in (device, peer)
        return 0


def test_needs_gpus_that_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(devices: int) -> str | None:
        peers._apart.cache_clear()
        return peers.refusal(range(devices))

    assert refusal(3) is None
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Cuda())
    assert refusal(2) is None
    assert refusal(3) == "CUDA says that GPU 0 can't reach the memory of GPU 2"
    peers._apart.cache_clear()
