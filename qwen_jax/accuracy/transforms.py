"""What loaders do to arrays of weights, for planting faults and for finding them."""

import numpy as np
from jaxtyping import Shaped

Rows = Shaped[np.ndarray, "rows ..."]


def permuted(array: Rows, heads: int) -> Rows:
    """Rows of each head in halves, (2, H/2), to pairs, (H/2, 2): what llama.cpp's converter does to
    queries and keys of its llama architecture, and to no other.

    Source: `LlamaModel.permute` in ggml-org/llama.cpp's convert_hf_to_gguf.py.
    """
    return _exchanged(array, heads, 2, -1)


def unpermuted(array: Rows, heads: int) -> Rows:
    """The inverse: what a loader of such files does."""
    return _exchanged(array, heads, -1, 2)


def _exchanged(array: Rows, heads: int, outer: int, inner: int) -> Rows:
    """Rows (outer, inner) of each head to (inner, outer)."""
    rows = array.reshape(heads, outer, inner, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)


def first_block(array: Shaped[np.ndarray, "rows columns"], block: int) -> Rows:
    """Zero but for each row's first values."""
    return np.where(np.arange(array.shape[1]) < block, array, array.dtype.type(0))


def next_parts(weight: Shaped[np.ndarray, "out in"], devices: int) -> Shaped[np.ndarray, "out in"]:
    """For each device's columns those of the next one."""
    return np.roll(weight, -(weight.shape[1] // devices), axis=1)


def first_twice(
    array: Shaped[np.ndarray, "..."], devices: int, axis: int
) -> Shaped[np.ndarray, "..."]:
    """With the first device's part in place of the second's, too."""
    first, _, *others = np.split(array, devices, axis)
    return np.concatenate([first, first, *others], axis)
