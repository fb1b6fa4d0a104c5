"""What differs between the JAX versions the kernels run on: 0.10 (Python 3.11) and later ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_LOAD_TAKES_INDEX = jax.__version_info__ < (0, 11)


def load(ref: Any, *, layout: Any = None, optimized: bool = True) -> jax.Array:
    """`plgpu.load` of a whole reference (slice it with `.at`); 0.10 asks for an index as well."""
    if _LOAD_TAKES_INDEX:
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    out_type: Any,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    scratch_types: Sequence[Any] | Mapping[str, Any] = (),
    warpgroups: int = 1,
    **compiler_params: Any,
) -> Callable[..., Any]:
    """`plgpu.kernel` with lane semantics, whose default 0.11 changed to warpgroup semantics.

    Args:
        name: of the kernel, as profilers and lowered programs show it.
        warpgroups: of 128 threads each; with several, `lax.axis_index("wg")` tells them apart.
        compiler_params: of `plgpu.CompilerParams`.
    """
    threads = {"num_threads": warpgroups, "thread_name": "wg"} if warpgroups > 1 else {}
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
