"""The order in which lanes read a tile's weights, and numbers of few bits in words."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped, UInt32

from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE, WARPS

FRAGMENT = M_TILE * K_TILE // WARPS
"""Weights of a tile that one warp reads, 16 outputs by 16 inputs, in the order [g, t, half, c]:

output 8 half + g, input 4 t + c. So lane 4 g + t reads eight weights in a row, which are its
operand of a tensor-core product.
"""


def joined(numbers: Shaped[Array, "*n m"]) -> UInt32[Array, "*n words"]:
    """Numbers of 8, 16 or 32 bits in words, the first one lowest.

    By shifts, which XLA fuses with what comes before and after, as it doesn't a cast of the bits of
    several numbers to one.
    """
    size = numbers.dtype.itemsize
    bits = lax.bitcast_convert_type(numbers, f"uint{8 * size}").astype(jnp.uint32)
    shifted = (bits[..., i :: 4 // size] << (8 * size * i) for i in range(4 // size))
    return functools.reduce(jnp.bitwise_or, shifted)


def apart(words: UInt32[Array, "*n words"], dtype: jnp.dtype) -> Shaped[Array, "*n m"]:
    """The same, back again."""
    size = dtype.itemsize
    shifts = jnp.arange(0, 32, 8 * size, dtype=jnp.uint32)
    bits = (words[..., None] >> shifts).astype(f"uint{8 * size}")
    return lax.bitcast_convert_type(bits, dtype).reshape(*words.shape[:-1], -1)


def fragments(words: UInt32[Array, "n 16 each"]) -> UInt32[Array, "n words"]:
    """Tiles' words, from each output's, in the order in which lanes read them."""
    grid = words.reshape(len(words), 2, 8, WARPS, 4, -1).transpose(0, 3, 2, 4, 1, 5)
    return grid.reshape(len(words), -1)


def whole(words: UInt32[Array, "n words"]) -> UInt32[Array, "n 16 each"]:
    """The same, back again."""
    grid = words.reshape(len(words), WARPS, 8, 4, 2, -1).transpose(0, 4, 2, 1, 3, 5)
    return grid.reshape(len(words), M_TILE, -1)
