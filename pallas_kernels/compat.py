"""What differs between the JAX versions the kernels run on: 0.10 (Python 3.11) and later ones."""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.lazy import lazy

_LOAD_TAKES_INDEX = jax.__version_info__ < (0, 11)
_STORES_MUST_COALESCE = jax.__version_info__ >= (0, 12)
# Its signatures are those of one version, the calls below are not.
plgpu = lazy("jax.experimental.pallas.mosaic_gpu")


def find_runtime() -> None:
    """Tells compiled kernels where Mosaic's runtime is, as its Python part does once imported.

    A process whose executables were compiled by an earlier one never imports that.
    """
    for cuda in ("jax_cuda13_plugin", "jax_cuda12_plugin"):
        spec = importlib.util.find_spec(cuda)
        for folder in (spec and spec.submodule_search_locations) or ():
            if (runtime := Path(folder) / "libmosaic_gpu_runtime.so").exists():
                os.environ.setdefault("MOSAIC_GPU_RUNTIME_LIB_PATH", str(runtime))


def load(ref: Any, *, layout: Any = None, optimized: bool = True) -> jax.Array:
    """`plgpu.load` of a whole reference (slice it with `.at`); 0.10 asks for an index as well."""
    if _LOAD_TAKES_INDEX:
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)


def store_few(ref: Any, value: jax.Array) -> None:
    """`ref[...] = value` of so few numbers that 0.12 would refuse them as an inefficient store."""
    if _STORES_MUST_COALESCE:
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    out_type: Any,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    scratch_types: Sequence[Any] | Mapping[str, Any] = (),
    warpgroups: int = 1,
    cluster: int = 1,
    **compiler_params: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel` with lane semantics, whose default 0.11 changed to warpgroup semantics.

    Args:
        name: of the kernel, as profilers and lowered programs show it.
        warpgroups: of 128 threads each; with several, `lax.axis_index("wg")` tells them apart.
        cluster: blocks that run together and reach each other's shared memory; the grid counts
            clusters.
        compiler_params: of `plgpu.CompilerParams`.
    """
    threads: dict[str, Any] = {}
    if warpgroups > 1:
        threads = {"num_threads": warpgroups, "thread_name": "wg"}
    if cluster > 1:
        threads |= {"cluster": (cluster,), "cluster_names": ("cluster",)}
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=grid,
        grid_names=grid_names,
        scratch_types=scratch_types,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, **compiler_params
        ),
        **threads,
    )
