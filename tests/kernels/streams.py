"""Weights as storages take them, and weight streams stored in another way."""

import gguf
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


def in_float32(packed: Packed, plan: StepPlan) -> tuple[Packed, StepPlan]:
    """The same weights, with which the reference rounds no input of a product."""
    wide = StepPlan(plan.shape, plan.blocks, alike("float32"))
    stream, offsets = empty_stream(wide), tile_offsets(wide)
    for phase in range(HEAD + 1):
        for layer in range(1 if phase == HEAD else plan.shape.layers):
            matrix = packed.matrix(plan, phase, layer)
            stream = put_matrix(stream, offsets[phase], matrix, layer, phase, "float32")
    return packed._replace(stream=stream, tile_offsets=offsets), wide
