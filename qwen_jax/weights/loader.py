"""From an open checkpoint to parameters on a device, without a second copy in host memory.

For a CPU, tensors are decoded straight into the memory that the device adopts; an accelerator
decodes them itself (`weights.on_device`).
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_jax.errors import UserError
from qwen_jax.weights import names
from qwen_jax.weights.blocks import BFLOAT16, fill
from qwen_jax.weights.checkpoint import Checkpoint, open_checkpoint
from qwen_jax.weights.on_device import iter_decoded
from qwen_jax.weights.open_files import Progress
from qwen_jax.weights.stored import not_finite

__all__ = ["Checkpoint", "decode", "iter_parameters", "load_parameters", "open_checkpoint"]

_ALIGNMENT = 64
_FLOAT32 = np.dtype(np.float32)
_DTYPES = (_FLOAT32, BFLOAT16, np.dtype(np.float16))


def load_parameters(
    checkpoint: Checkpoint,
    dtype: DTypeLike,
    *,
    device: jax.Device | jax.sharding.Sharding | None = None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """All of `iter_parameters`, by name, once they have arrived."""
    loaded = dict(iter_parameters(checkpoint, dtype, device=device, progress=progress))
    jax.block_until_ready(loaded)
    checkpoint.check_unchanged()
    return loaded


def iter_parameters(
    checkpoint: Checkpoint,
    dtype: DTypeLike,
    *,
    device: jax.Device | jax.sharding.Sharding | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, jax.Array]]:
    """Each parameter by its canonical name, in `dtype` except the norms, which stay float32.

    For a CPU, and where one array lies on several devices, each tensor is decoded straight into
    `dtype` and put on the device at once, so the host holds at most two parameters that are not
    yet there. For one accelerator it holds some pieces of the file.

    Args:
        dtype: float32, bfloat16 or float16.
        device: where to put them; JAX's default device if None.
        progress: called with the bytes of the checkpoint read so far and in all.

    Raises:
        UserError: a value is not finite, or not in float16's range; of an accelerator's
            parameters when the last has been asked for.
    """
    compute = jnp.dtype(dtype)
    if compute not in _DTYPES:
        raise UserError(
            f"dtype is {compute.name!r}; choose one of {', '.join(d.name for d in _DTYPES)}."
        )
    if decodes_there(device):
        return iter_decoded(checkpoint, compute, device, progress)
    return _iter_adopted(checkpoint, compute, device, progress)


def decodes_there(device: jax.Device | jax.sharding.Sharding | None) -> bool:
    """Whether it is one accelerator, which decodes what it gets; None is JAX's default device."""
    devices: Any = {device or jax.local_devices()[0]}
    if isinstance(device, jax.sharding.Sharding):
        devices = device.device_set
    return len(devices) == 1 and all(one.platform != "cpu" for one in devices)


def _iter_adopted(
    checkpoint: Checkpoint,
    compute: np.dtype,
    device: jax.Device | jax.sharding.Sharding | None,
    progress: Progress | None,
) -> Iterator[tuple[str, jax.Array]]:
    sizes = {
        name: sum(info.nbytes for info in weight.infos)
        for name, weight in checkpoint.stored.items()
    }
    total = sum(sizes.values())
    done = 0
    previous: jax.Array | None = None
    for parameter in checkpoint.parameters:
        host = aligned(parameter.shape, np.dtype(np.float32) if parameter.keep_float32 else compute)
        for name in decode(checkpoint, parameter, host):
            done += sizes[name]
            if progress:
                progress(done, total)
        # One transfer runs while the next parameter is decoded.
        if previous is not None:
            previous.block_until_ready()
        previous = jax.device_put(host, device)
        yield parameter.name, previous


def decode(checkpoint: Checkpoint, parameter: names.Parameter, out: np.ndarray) -> Iterator[str]:
    """Decodes the sources into their rows of `out`; yields each one's name when done."""
    row = 0
    for name, shape in parameter.sources.items():
        rows = out[row : row + shape[0]]
        stored = checkpoint.stored[name]
        if not fill(rows, stored.rows):
            raise not_finite(name, stored, out.dtype)
        row += shape[0]
        yield name


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that a CPU device adopts as it is: unaligned, JAX would copy it."""
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
