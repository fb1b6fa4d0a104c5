"""`all_reduce` as one kernel on every device: it stores its rows into the others' memory, waits for
theirs, and adds.

Block i of a device meets block i of every other one, and nobody else. Before such a kernel XLA has
all devices meet (a kernel of its own), so that the memory that is stored into is there and nobody
reads it, and the counters of arrivals are zero.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.lazy import lazy
from pallas_kernels.peers import refusal as peers_refusal

pl = lazy("jax.experimental.pallas")
plgpu = lazy("jax.experimental.pallas.mosaic_gpu")

THREADS = 128
MOST_BLOCKS = 128
"""That all run at once, one a multiprocessor."""
NUMBERS = (1, 2, 4, 8, 16, 32)
"""Of a thread."""
MOST_BYTES = 1 << 20
"""Of a device: with more NCCL's rings win, which send less."""
DTYPES = ("bfloat16", "float16", "float32")


def _numbers(size: int) -> int | None:
    """The fewest numbers a thread may have with so many in all, or None if none fits."""
    return next(
        (n for n in NUMBERS if size % (THREADS * n) == 0 and size <= MOST_BLOCKS * THREADS * n),
        None,
    )


def refusal(rows: int, width: int, dtype: DTypeLike, devices: Sequence[int]) -> str | None:
    """Why the kernel can't add up so many rows, or None where it can."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        return f"its kernel takes {', '.join(DTYPES)}, not {dtype.name}"
    if rows * width * dtype.itemsize > MOST_BYTES:
        return f"{rows} rows of {width} are more than {MOST_BYTES >> 20} MiB"
    if _numbers(rows * width) is None:
        return f"{rows} rows of {width} numbers are not whole blocks of {THREADS * NUMBERS[0]}"
    return peers_refusal(devices)


def all_reduce(x: Float[Array, "B D"], axis: str, devices: int) -> Float[Array, "B D"]:
    numbers = _numbers(x.size)
    assert numbers is not None, "refused before"
    chunk = numbers * THREADS
    blocks = x.size // chunk

    # Lanes have neighbouring numbers, of 32 bits: Mosaic can't know how a pointer to another device
    # is aligned, and stores number by number.
    strided = plgpu.Layout.WG_STRIDED((chunk,), vec_size=1)

    def body(x_ref: Any, out_ref: Any, parts_ref: Any, arrived: Any) -> None:
        block, mine = lax.axis_index("block"), lax.axis_index(axis)

        def loaded(ref: Any) -> jax.Array:
            return compat.load(ref, layout=strided, optimized=False).astype(jnp.float32)

        own = loaded(x_ref.at[block])
        others = [(mine + step) % devices for step in range(1, devices)]
        for other in others:
            there = plgpu.remote_ref(parts_ref, other)
            compat.store_few(there.at[mine, block], own)
        for other in others:
            pl.semaphore_signal(arrived, device_id=other)
        pl.semaphore_wait(arrived, devices - 1)
        total: Any = 0.0
        for device in range(devices):
            # Nobody has stored this device's own.
            total += jnp.where(mine == device, own, loaded(parts_ref.at[device, block]))
        compat.store_few(out_ref.at[block], total.astype(x.dtype))

    kernel = compat.kernel(
        body,
        name="all_reduce",
        out_type=(
            jax.ShapeDtypeStruct((blocks, chunk), x.dtype),
            jax.ShapeDtypeStruct((devices, blocks, chunk), jnp.float32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        scratch_types=(plgpu.SemaphoreType.REGULAR,),
    )
    summed: Float[Array, "B D"] = kernel(x.reshape(blocks, chunk))[0].reshape(x.shape)
    return summed
