"""The sum over devices of a few rows that each of them has."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Float

from pallas_kernels.all_reduce.reference import reference
from pallas_kernels.implementation import choose


def all_reduce(
    x: Float[Array, "B D"], axis: str, devices: Sequence[int], *, implementation: str = "auto"
) -> Float[Array, "B D"]:
    """Adds up what the devices of a mesh's axis have, inside `shard_map`.

    The kernel stores into the other devices' memory over NVLink, by plain stores and signals, and
    adds in the devices' order, so that all have the same bits. It is for the latency of few rows.

    Args:
        axis: the mesh's only axis.
        devices: of the mesh, by their numbers in JAX.

    Raises:
        UnsupportedError: `implementation` can't serve the case.
    """
    from pallas_kernels.all_reduce import mosaic_gpu  # heavy, and only tracing needs it

    rows, width = x.shape
    why_not = mosaic_gpu.refusal(rows, width, x.dtype, devices)
    with jax.named_scope("all_reduce"):
        if choose("all_reduce", implementation, why_not) == "mosaic_gpu":
            return mosaic_gpu.all_reduce(x, axis, len(devices))
        return reference(x, axis)
