"""Weights as storages take them, and weight streams stored in another way."""

import functools
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_step import (
    GATE_UP,
    HEAD,
    Packed,
    StepPlan,
    empty_stream,
    put_matrix,
    tile_offsets,
)
from pallas_kernels.decode_step.packed.blocks import Blocks
from pallas_kernels.decode_step.packed.storages import STORAGES
from qwen_jax.weights.blocks import FORMATS


def kind_of(stored: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[stored.upper()]


def as_stored(weights: np.ndarray, stored: str) -> np.ndarray:
    """What `put_matrix` takes for a float32 matrix: numbers, or a file's blocks.

    gguf makes blocks of few formats; of the others they are drawn, of about the weights' size.
    """
    if not isinstance(STORAGES[stored], Blocks):
        return weights.astype(jnp.dtype(stored))
    if stored in INTEGERS:
        return integers_of(np.random.default_rng(int(abs(weights[0, 0]) * 1e9)), weights, stored)[0]
    kind = kind_of(stored)
    try:
        return gguf.quants.quantize(weights, kind)
    except NotImplementedError:
        return random_blocks(np.random.default_rng(int(abs(weights[0, 0]) * 1e9)), weights, stored)


INTEGERS = {"int4": 15, "int8": 255}
"""The largest code."""


def integers_of(
    rng: np.random.Generator, like: np.ndarray, stored: str
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of any codes and zero points, with values of about that size, and those in float64."""
    most, (rows, columns) = INTEGERS[stored], like.shape
    q = rng.integers(0, most + 1, (rows, columns // 32, 32), np.uint8)
    zero = rng.integers(0, most + 1, (rows, columns // 32, 1), np.uint8)
    d = (np.std(like) / most * rng.uniform(1, 3, zero.shape)).astype(np.float16)
    values = d.astype(np.float64) * (q.astype(np.float64) - zero)
    codes = q[..., :16] | q[..., 16:] << 4 if most == 15 else q
    blocks = np.concatenate([d.view(np.uint8), zero, np.zeros_like(zero), codes], axis=-1)
    return blocks.reshape(rows, -1), values.reshape(rows, columns)


def random_blocks(rng: np.random.Generator, like: np.ndarray, stored: str) -> np.ndarray:
    """Any codes and small scales, of which values of that size come."""
    kind, layout = kind_of(stored), FORMATS[kind_of(stored)].layout
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (len(like), like.shape[1] // block * size), np.uint8)
    units = raw.reshape(-1, size).view(layout)[:, 0]
    units["d"] = 1 + rng.random(len(units))
    if "dmin" in layout.names:
        # So that the mean is zero: minima are as large as scales, times the mean code.
        units["dmin"] = units["d"] * {"q2_k": 1.5, "q4_k": 7.5, "q5_k": 15.5}[stored]
    values = gguf.quants.dequantize(raw, kind)
    for name in {"d", "dmin"} & {*layout.names}:
        units[name] *= np.std(like) / np.sqrt(np.mean(values**2))
    return raw


def anything(
    rng: np.random.Generator, stored: str, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a storage takes, and the numbers that gguf makes of it."""
    if not isinstance(STORAGES[stored], Blocks):
        numbers = rng.standard_normal((rows, columns), np.float32).astype(stored)
        return numbers, numbers
    if stored in INTEGERS:
        given, right = integers_of(rng, np.ones((rows, columns)) + rng.random(columns), stored)
        return given, right.astype(np.float32)
    block, size = gguf.GGML_QUANT_SIZES[kind_of(stored)]
    given = rng.integers(0, 256, (rows, columns // block * size), np.uint8)
    with np.errstate(all="ignore"):
        return given, gguf.quants.dequantize(given, kind_of(stored))


def same(found: object, right: np.ndarray) -> bool:
    """The same bits, or both NaN; zero has no sign, since -0 + 0 may lose it."""
    ours = np.asarray(found)
    assert ours.dtype == right.dtype
    nan = np.isnan(right)
    return bool((np.isnan(ours) == nan).all() and np.array_equal(ours[~nan], right[~nan]))


def put(
    plan: StepPlan, stream: Any, matrix: Any, phase: int, layer: int = 0, segment: int | None = None
) -> Any:
    """A phase's matrix, or a segment of it, as its storage takes it, put into the stream."""
    name = plan.stored(phase, layer)[segment or 0]
    return put_matrix(stream, plan.at(phase, layer, segment), matrix, phase == GATE_UP, name)


def put_numbers(plan: StepPlan, stream: Any, matrix: np.ndarray, phase: int, layer: int) -> Any:
    """The same of a float32 matrix, each segment as its storage takes it."""
    this = plan.phases[phase]
    ends = (*this.begins[1:], this.m_tiles)
    for n, stored in enumerate(plan.stored(phase, layer)):
        rows = matrix[16 * this.begins[n] : 16 * ends[n]]
        stream = put(plan, stream, as_stored(rows, stored), phase, layer, n)
    return stream


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
    other = StepPlan.uniform(plan.shape, plan.blocks, stored)
    stream = empty_stream(other)
    for (phase, layer), matrix in matrices(packed, plan).items():
        stream = put(other, stream, matrix, phase, layer)
    return packed._replace(stream=stream, tile_offsets=tile_offsets(other)), other
