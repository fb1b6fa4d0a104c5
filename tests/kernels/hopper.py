"""Programs for Hopper without a GPU: lowered for CUDA and, where JAX's CUDA plugin is, compiled.

Lowering finds layouts and copies that can't be. Compiling them to machine code finds the rest:
instructions that the assembler refuses, and shared memory that a block can't have. It needs the
plugin's 140 MB, so that `make compile` does it and `make test` doesn't.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
from jax import ShapeDtypeStruct
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# What XLA wants to know of an H100; the fields are those of its `GpuTargetConfigProto`.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def devices(count: int) -> list[Any] | None:
    """So many Hopper GPUs of one host that needn't be there, or None without the plugin."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return None
    topology = f"1x1x{count}"
    described = topologies.get_topology_desc("", "cuda", target_config=H100, topology=topology)
    return list(described.devices)


@functools.cache
def _sharding() -> SingleDeviceSharding | None:
    """On one of them."""
    found = devices(1)
    return None if found is None else SingleDeviceSharding(found[0])


def compiles() -> bool:
    """Whether programs can be compiled here, not only lowered."""
    return _sharding() is not None


def _lowered(function: Callable[..., Any], arguments: Any, **how: Any) -> Any:
    sharding = _sharding()
    if sharding is not None:
        arguments = jax.tree.map(
            lambda x: ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
        )
    return jax.jit(function, **how).trace(*arguments).lower(lowering_platforms=("cuda",))


def temporary_bytes(function: Callable[..., Any], *arguments: Any, donate: int) -> int:
    """What the compiled program needs besides its arguments and results."""
    analysis = _lowered(function, arguments, donate_argnums=donate).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def compiled(function: Callable[..., Any], *arguments: Any) -> str:
    """The compiled program, as text."""
    return str(_lowered(function, arguments).compile().as_text())


def lower(function: Callable[..., Any], *arguments: Any) -> str:
    """The lowered program, as text; compiled as well where it can be."""
    lowered = _lowered(function, arguments)
    if compiles():
        lowered.compile()
    return lowered.as_text()
