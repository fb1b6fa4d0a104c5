"""Weights as storages take them, and weight streams stored in another way."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_step import (
    HEAD,
    Packed,
    StepPlan,
    alike,
    empty_stream,
    put_matrix,
    tile_offsets,
)


def as_stored(weights: np.ndarray, stored: str) -> np.ndarray:
    """What `put_matrix` takes for a float32 matrix: numbers, or a file's blocks."""
    if stored == "q8_0":
        return gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    return weights.astype(jnp.dtype(stored))


@functools.partial(jax.jit, static_argnums=1)
def matrices(packed: Packed, plan: StepPlan) -> dict[tuple[int, int], jax.Array]:
    """Of every phase and layer, read back by one program instead of one for each operation."""
    return {
        (phase, layer): packed.matrix(plan, phase, layer)
        for phase in range(HEAD + 1)
        for layer in range(1 if phase == HEAD else plan.shape.layers)
    }


def stored_again(packed: Packed, plan: StepPlan, stored: str) -> tuple[Packed, StepPlan]:
    """The same weights as numbers of one dtype; with float32, in which nothing is lost, the
    reference rounds no input of a product.
    """
    other = StepPlan(plan.shape, plan.blocks, alike(stored))
    stream, offsets = empty_stream(other), tile_offsets(other)
    for (phase, layer), matrix in matrices(packed, plan).items():
        stream = put_matrix(stream, offsets[phase], matrix, layer, phase, stored)
    return packed._replace(stream=stream, tile_offsets=offsets), other
