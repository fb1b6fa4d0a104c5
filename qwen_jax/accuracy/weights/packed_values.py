"""GPTQ, AWQ and FP8 weights by their formulas in float64: a second reading of these formats.

It shares no arithmetic with the loader's: integers are read bit by bit, and each value's group is
looked up. No library that decodes these formats runs everywhere.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Float64, Int, Shaped

from qwen_jax.weights.float8 import Float8
from qwen_jax.weights.integers import Awq, Gptq

Packed = Gptq | Awq | Float8
Read = Callable[[str], Shaped[np.ndarray, "..."]]

_STEP = 256
"""Rows in float64 at once."""


def packed_rows(
    weight: Packed, read: Read, start: int, stop: int
) -> Float32[np.ndarray, "rows columns"]:
    """Rows [start, stop) of a weight; `read` gives a tensor of the checkpoint by its name."""
    tensors = {name: read(name) for name in weight.tensors}
    out = np.empty((stop - start, weight.shape[1]), np.float32)
    for first in range(start, stop, _STEP):
        rows = np.arange(first, min(first + _STEP, stop))
        out[rows - start] = (
            _float8(weight, tensors, rows)
            if isinstance(weight, Float8)
            else _integers(weight, tensors, rows)
        )
    return out


def _float8(
    weight: Float8, tensors: dict[str, np.ndarray], rows: Int[np.ndarray, " rows"]
) -> Float64[np.ndarray, "rows columns"]:
    values, scales = tensors[weight.name][rows].astype(np.float64), tensors[weight.scale]
    if weight.block:
        columns = np.arange(weight.shape[1])
        scales = scales[np.ix_(rows // weight.sides[0], columns // weight.sides[1])]
    elif scales.size > 1:
        scales = scales.reshape(-1, 1)[rows]
    return values * scales.astype(np.float64)


def _integers(
    weight: Gptq | Awq, tensors: dict[str, np.ndarray], rows: Int[np.ndarray, " rows"]
) -> Float64[np.ndarray, "rows columns"]:
    parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    if isinstance(weight, Gptq):
        quants = _numbers(parts["qweight"][:, rows].T, weight.bits)
        zeros = _numbers(parts["qzeros"], weight.bits)[:, rows].T
        zeros = (zeros + weight.zeros_less_one) % 2**weight.bits
    else:
        # Of a word's outputs the even ones come first.
        size = 32 // weight.bits
        words = slice(rows[0] // size, rows[-1] // size + 1)
        place = rows // size * size + rows % size // 2 + rows % 2 * (size // 2)
        quants, zeros = (
            _numbers(parts[name][:, words], weight.bits)[:, place - words.start * size].T
            for name in ("qweight", "qzeros")
        )
    group = parts.get("g_idx", np.arange(weight.shape[1]) // weight.inputs_per_group)
    scales = parts["scales"][:, rows].T.astype(np.float64)
    return (quants - zeros[:, group]) * scales[:, group]


def _numbers(words: Int[np.ndarray, "rows words"], bits: int) -> Int[np.ndarray, "rows n"]:
    """Each row's integers, read bit by bit, the lowest first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    single = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(words), -1, bits)
    return single @ (1 << np.arange(bits))
