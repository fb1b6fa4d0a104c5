"""The decode-step kernel without a GPU: it lowers for CUDA at real sizes, or says why not."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct

from pallas_kernels.decode_step import Plan, Shape, mosaic_gpu
from tests.kernels import hopper

SIZES = {
    "0.5b": Shape(24, 896, 14, 2, 64, 4864, 151936, 1e-6),
    "1.5b": Shape(28, 1536, 12, 2, 128, 8960, 151936, 1e-6),
    "3b": Shape(36, 2048, 16, 2, 128, 11008, 151936, 1e-6),
    "7b": Shape(28, 3584, 28, 4, 128, 18944, 152064, 1e-6),
    "14b": Shape(48, 5120, 40, 8, 128, 13824, 152064, 1e-6),
}
LARGE = {
    "32b": Shape(64, 5120, 40, 8, 128, 27648, 152064, 1e-6),
    "72b": Shape(80, 8192, 64, 8, 128, 29568, 152064, 1e-6),
}


def lower(shape: Shape, capacity: int) -> str:
    plan = Plan(shape, 132)

    def f32(*dims: int) -> ShapeDtypeStruct:
        return ShapeDtypeStruct(dims, jnp.float32)

    dims = (2 * shape.layers, shape.kv_heads, capacity, shape.head_dim)
    arguments: tuple[Any, ...] = (
        ShapeDtypeStruct((plan.tape_tiles, 64, 128), jnp.bfloat16),
        f32(shape.layers, shape.qkv),
        f32(2 * shape.layers + 1, shape.hidden),
        f32(shape.hidden),
        f32(2, shape.head_dim // 2),
        ShapeDtypeStruct(dims, jnp.bfloat16),
        ShapeDtypeStruct((1,), jnp.int32),
    )
    return hopper.lower(mosaic_gpu.build(plan, capacity), *arguments)


@pytest.mark.parametrize("capacity", [256, 32768])
@pytest.mark.parametrize("size", SIZES)
def test_lowers_at_real_sizes(size: str, capacity: int) -> None:
    text = lower(SIZES[size], capacity)
    assert "mosaic_gpu" in text
    assert "decode_step" in text


@pytest.mark.parametrize("size", SIZES)
def test_shared_memory_is_enough(size: str) -> None:
    """What the plan takes of it, counted apart from the code that divides it."""
    shape = SIZES[size]
    memory = mosaic_gpu.memory(Plan(shape, 132))
    tiles = memory.stages * 64 * 128 + (1 + 2 * memory.kv_stages) * 64 * shape.head_dim
    numbers = shape.hidden + memory.inputs + 64 * shape.head_dim
    assert 2 * tiles + 4 * numbers + mosaic_gpu.RESERVED_BYTES <= 232_448
    assert memory.stages >= mosaic_gpu.FEWEST_STAGES


@pytest.mark.parametrize(
    ("shape", "capacity", "dtype", "why"),
    [
        (SIZES["0.5b"], 512, "float32", "float32, not bfloat16"),
        (SIZES["0.5b"], 520, "bfloat16", "520 slots are not a multiple of 64"),
        (Shape(2, 256, 8, 2, 32, 512, 320, 1e-6), 512, "bfloat16", "head dimension is 32"),
        (Shape(2, 192, 4, 2, 64, 512, 320, 1e-6), 512, "bfloat16", "512 x 192 is not made of"),
        (Shape(2, 1024, 18, 2, 64, 512, 320, 1e-6), 512, "bfloat16", "9 query heads"),
    ],
)
def test_what_cannot_run_is_refused_with_the_value(
    shape: Shape, capacity: int, dtype: str, why: str
) -> None:
    assert why in str(mosaic_gpu.refusal(Plan(shape, 132), capacity, dtype))


@pytest.mark.parametrize("size", SIZES)
def test_what_runs_is_not_refused(size: str) -> None:
    assert mosaic_gpu.refusal(Plan(SIZES[size], 132), 131072, "bfloat16") is None


@pytest.mark.parametrize("size", LARGE)
def test_models_whose_vectors_leave_no_room_for_weights_are_refused(size: str) -> None:
    why = str(mosaic_gpu.refusal(Plan(LARGE[size], 132), 256, "bfloat16"))
    assert "shared memory has room for" in why


def test_slots_are_enough_for_every_block_of_a_row() -> None:
    for shape in SIZES.values():
        for phase in Plan(shape, 132).phases:
            owners = phase.owner(np.arange(phase.tiles)).reshape(-1, phase.across)
            assert (owners[:, -1] - owners[:, 0]).max() < phase.slots


@pytest.mark.parametrize("shape", [*SIZES.values(), Shape(2, 256, 4, 2, 64, 512, 1024, 1e-6)])
def test_which_slots_are_filled(shape: Shape) -> None:
    """A reader waits for every slot that this says is filled: one too many would hang it."""
    for phase in Plan(shape, 132).phases:
        for row in range(0, phase.rows // 64, 1 + phase.rows // 6400):
            tiles = np.arange(row * phase.across, (row + 1) * phase.across)
            said = [s for s in range(phase.slots) if phase.fills(s, row)]
            first = phase.owner(tiles[0])
            assert {first + s for s in said} == set(phase.owner(tiles).tolist())
