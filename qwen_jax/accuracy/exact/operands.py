"""What engines round an activation to before they multiply a matrix with it, and its error.

llama.cpp rounds it to float16 or bfloat16 where the matrix is of that type, and to blocks of 8 bits
where it is quantised (`vec_dot_type` in ggml-cpu.c): with m the block's largest magnitude and
d = m / 127, a value x becomes d round(x / d), which is off by m / 254 at most. Blocks of 32 keep d
in float16: all of a block's values are off by one and the same part u of themselves besides, which
counts sqrt(32) times what independent roundings would (Cauchy and Schwarz), and by 127 times
float16's least spacing, halved, where d is tiny.
"""

import numpy as np
from jaxtyping import Float

from qwen_jax.accuracy.exact.rounding import UNIT

BLOCKS = {"q8_0": 32, "q8_1": 32, "q8_K": 256}
"""Values that share a scale. q8_1, for matrices with a minimum, also keeps each block's sum."""

KINDS = ("float16", "bfloat16", *BLOCKS)

_U16 = UNIT["float16"]
_LEAST = 2.0**-25
"""Half of the spacing of float16's smallest numbers."""


def squared_error(
    kind: str, x: Float[np.ndarray, "T K"], squared: Float[np.ndarray, "F K"]
) -> Float[np.ndarray, "T F"]:
    """The squares of all of a product's roundings of `x`, added up.

    Args:
        kind: one of `KINDS`.
        squared: the matrix's values, squared.
    """
    if kind not in BLOCKS:
        least = _LEAST if kind == "float16" else 0.0
        return (UNIT[kind] * np.abs(x) + least) ** 2 @ squared.T
    size = BLOCKS[kind]
    steps = _blocks(np.abs(x), size).max(-1, keepdims=True) / 254
    steps = np.broadcast_to(steps, (*steps.shape[:2], size)).reshape(len(x), -1)[:, : x.shape[1]]
    if kind == "q8_K":  # its scale is float32
        return steps**2 @ squared.T
    out = (steps**2 + size * (_U16 * x) ** 2 + (127 * _LEAST) ** 2) @ squared.T
    if kind == "q8_1":
        # The sum, in float16, meets the block's minimum, which is among the block's values.
        sums, least = _blocks(x, size).sum(-1), _blocks(squared, size).max(-1)
        out += (_U16 * np.abs(sums) + _LEAST) ** 2 @ least.T
    return out


def _blocks(x: Float[np.ndarray, "rows K"], size: int) -> Float[np.ndarray, "rows n size"]:
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % size)))
    return padded.reshape(len(x), -1, size)
