"""The decode-step kernel without a GPU: it lowers for CUDA at real sizes, or says why not."""

import dataclasses
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct

from pallas_kernels.decode_step import ModelShape, StepPlan, kernels
from pallas_kernels.decode_step.common import launch
from pallas_kernels.decode_step.common.cache import Pool
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few_rows
from pallas_kernels.decode_step.many_rows import mosaic_gpu as many_rows
from pallas_kernels.decode_step.packed.plan import DOWN
from qwen_jax.engine import split_packed
from qwen_jax.mesh import MeshShape
from tests.kernels import hopper
from tests.kernels.inside_step import config_of

SIZES = {
    "0.5b": ModelShape(24, 896, 14, 2, 64, 4864, 151936, 1e-6),
    "1.5b": ModelShape(28, 1536, 12, 2, 128, 8960, 151936, 1e-6),
    "3b": ModelShape(36, 2048, 16, 2, 128, 11008, 151936, 1e-6),
    "7b": ModelShape(28, 3584, 28, 4, 128, 18944, 152064, 1e-6),
    "14b": ModelShape(48, 5120, 40, 8, 128, 13824, 152064, 1e-6),
    "32b": ModelShape(64, 5120, 40, 8, 128, 27648, 152064, 1e-6),
    "72b": ModelShape(80, 8192, 64, 8, 128, 29568, 152064, 1e-6),
}
MOST_FEW_ROWS = {"0.5b": 16, "1.5b": 16, "3b": 16, "7b": 11, "14b": 8, "32b": 8, "72b": 5}
SMALL = ModelShape(2, 256, 4, 2, 64, 512, 1024, 1e-6)
TINY = ModelShape(2, 256, 4, 2, 64, 256, 1024, 1e-6)
"""A layer of it is less than an M-tile for each of 132 blocks."""
HALF_72B = ModelShape(80, 8192, 32, 4, 128, 14784, 76032, 1e-6)
"""The feed-forward is 115.5 tiles."""


def plan_of(shape: ModelShape, stored: str = "bfloat16", blocks: int = 132) -> StepPlan:
    return StepPlan.uniform(shape, blocks, stored)


def lower(
    plan: StepPlan,
    rows: int,
    capacity: int,
    kernel: types.ModuleType = few_rows,
    cache: str | None = None,
    recorded: bool = False,
    several: bool = False,
) -> str:
    """The kernel for that plan, with a cache of its weights' dtype or another."""
    shape, cache = plan.shape, cache or plan.head

    def f32(*dims: int) -> ShapeDtypeStruct:
        return ShapeDtypeStruct(dims, jnp.float32)

    pool = Pool(rows * capacity // 128 + 1, 128, capacity // 128)
    dims = (2 * shape.layers, pool.pages, shape.kv_heads, pool.slots, shape.head_dim)
    arguments: tuple[Any, ...] = (
        ShapeDtypeStruct(plan.stream_shape, jnp.uint32),
        ShapeDtypeStruct(plan.table().shape, jnp.int32),
        f32(shape.layers, shape.qkv),
        f32(2 * shape.layers + 1, shape.hidden),
        f32(rows, shape.hidden),
        f32(rows, 2, shape.head_dim // 2),
        ShapeDtypeStruct(dims, cache),
        ShapeDtypeStruct((rows, pool.table), jnp.int32),
        ShapeDtypeStruct((2, rows) if several else (rows,), jnp.int32),
    )
    built = kernel.build(plan, rows, pool, jnp.dtype(cache), recorded=recorded, several=several)
    return hopper.lower(built, *arguments)


@pytest.mark.lower
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("rows", "capacity", "dtype"),
    [
        (1, 256, "bfloat16"),
        (1, 32768, "float16"),
        (8, 4096, "bfloat16"),
        (16, 1024, "float16"),
    ],
)
def test_lowers_at_real_sizes(size: str, rows: int, capacity: int, dtype: str) -> None:
    if why := few_rows.refusal(plan_of(SIZES[size], dtype), rows, dtype):
        assert rows > MOST_FEW_ROWS[size]
        pytest.skip(why)
    text = lower(plan_of(SIZES[size], dtype), rows, capacity)
    assert "mosaic_gpu" in text
    assert "decode_step" in text


@pytest.mark.lower
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("rows", "capacity", "dtype"),
    [(17, 256, "float16"), (64, 32768, "bfloat16")],
)
def test_many_rows_lower_at_real_sizes(size: str, rows: int, capacity: int, dtype: str) -> None:
    assert kernels.refusal(plan_of(SIZES[size], dtype), rows, dtype) is None
    assert "decode_step_many" in lower(plan_of(SIZES[size], dtype), rows, capacity, many_rows)


@pytest.mark.lower
@pytest.mark.parametrize(
    ("size", "stored", "rows", "kernel"),
    [
        *(("0.5b", stored, 1, few_rows) for stored in ("bfloat16", "q8_0")),
        *(("0.5b", stored, 64, many_rows) for stored in ("float16", "q8_0")),
        ("7b", "q4_k", 8, few_rows),
        ("72b", "bfloat16", 64, many_rows),
    ],
)
def test_kernels_that_record_lower(
    size: str, stored: str, rows: int, kernel: types.ModuleType
) -> None:
    assert_lowers_with_more("recorded", plan_of(SIZES[size], stored), rows, 1024, kernel)


def assert_lowers_with_more(
    option: str, plan: StepPlan, rows: int, slots: int, kernel: types.ModuleType
) -> None:
    """The kernel is another one, and larger, where it is built with the option."""
    plain, larger = (
        lower(plan, rows, slots, kernel, "bfloat16", **{option: on}) for on in (False, True)
    )
    assert len(larger) > len(plain)


@pytest.mark.lower
@pytest.mark.parametrize(
    ("size", "stored", "rows", "kernel"),
    [
        ("0.5b", "bfloat16", 8, few_rows),
        ("1.5b", "float16", 8, few_rows),
        ("7b", "q4_k", 8, few_rows),
        *((size, "bfloat16", rows, many_rows) for size in ("0.5b", "7b") for rows in (8, 64)),
    ],
)
def test_kernels_of_several_positions_lower(
    size: str, stored: str, rows: int, kernel: types.ModuleType
) -> None:
    assert_lowers_with_more("several", plan_of(SIZES[size], stored), rows, 32768, kernel)


@pytest.mark.lower
@pytest.mark.parametrize("rows", range(1, few_rows.MOST_ROWS + 1))
@pytest.mark.parametrize("size", SIZES)
def test_shared_memory_is_enough(size: str, rows: int) -> None:
    """What the plan takes of it, counted apart from the code that divides it."""
    shape, plan = SIZES[size], plan_of(SIZES[size])
    if few_rows.refusal(plan, rows, "bfloat16"):
        assert rows > MOST_FEW_ROWS[size]
        return
    assert rows <= MOST_FEW_ROWS[size]
    memory, _, cut = found = few_rows.divided(plan, rows)
    longest = -(-shape.ffn // 128 // plan.phases[DOWN].parts)
    inputs = max(shape.hidden, 128 * longest) * rows * 4
    assert memory.inputs >= max(inputs, 8 * shape.group * (shape.head_dim + 2) * 4)
    stage = max(stages.bytes for stages in cut)
    assert stage >= 4096 * max(stages.tiles for stages in cut)
    assert memory.stages * (stage + 16) <= memory.ring + memory.barriers
    assert sum(memory) <= 232_448 - 2048
    assert memory.stages >= found.fewest
    # Copies want 16 bytes, the barriers 8.
    assert stage % 16 == 0
    assert all(begin % 16 == 0 for begin in launch.begins(memory))


@pytest.mark.parametrize("rows", [1, 16, 17, 48, 64])
@pytest.mark.parametrize("size", SIZES)
def test_shared_memory_is_enough_for_many_rows(size: str, rows: int) -> None:
    """Counted apart from the code that divides it."""
    shape, plan = SIZES[size], plan_of(SIZES[size])
    assert many_rows.refusal(plan, rows, "bfloat16") is None
    memory, padded = many_rows.memory(plan, rows), -(-rows // 16) * 16
    groups = many_rows.groups_of(plan, rows)
    # A ring that a stage doesn't fit into twice would not fetch ahead.
    assert memory.units >= 2 * max(2048 * g.units * g.m_tiles for g in groups)
    assert memory.inputs >= 3 * 128 * 2 * padded
    # Eight warps' sums, or the parts of a group of heads that they found, and the new token's.
    assert memory.sums >= 8 * 16 * padded * 4
    assert memory.sums >= 9 * shape.group * (shape.head_dim + 2) * 4
    assert memory.own >= -(-(shape.hidden // 16) // 132) * 16 * rows * 4
    assert sum(memory) <= 232_448 - 2048
    assert all(begin % 16 == 0 for begin in launch.begins(memory))
    # The sums of a lane stay in its registers.
    assert max(g.each for g in groups) * -(-rows // 8) * 4 <= 96
    assert all(g.m_tiles <= (8 // g.sharers) * g.each for g in groups)


@pytest.mark.parametrize(
    ("size", "rows", "kernel"),
    [("0.5b", 16, few_rows), ("0.5b", 17, many_rows), ("1.5b", 9, few_rows),
     ("1.5b", 10, many_rows), ("7b", 4, few_rows), ("7b", 5, many_rows), ("72b", 1, few_rows),
     ("72b", 64, many_rows)],
)  # fmt: skip
def test_the_faster_kernel_is_built(
    monkeypatch: pytest.MonkeyPatch, size: str, rows: int, kernel: types.ModuleType
) -> None:
    built = []
    for module in (few_rows, many_rows):
        monkeypatch.setattr(module, "build", lambda *_, module=module: built.append(module))
    kernels.build(plan_of(SIZES[size]), rows, Pool(64, 128, 2), jnp.dtype("bfloat16"))
    assert built == [kernel]


@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "why"),
    [
        (SIZES["0.5b"], 1, "float32", "the cache is float32, not bfloat16 or float16"),
        (SIZES["0.5b"], 65, "bfloat16", "at most 64 rows, not 65"),
        (ModelShape(2, 256, 8, 2, 32, 512, 320, 1e-6), 1, "bfloat16", "head dimension is 32"),
        (ModelShape(2, 192, 4, 2, 64, 512, 320, 1e-6), 1, "bfloat16", "512 x 192 is not made of"),
        (ModelShape(2, 64, 2, 1, 32, 96, 320, 1e-6), 1, "bfloat16", "128 x 64 is not made of"),
        (ModelShape(2, 1024, 18, 2, 64, 512, 320, 1e-6), 1, "bfloat16", "9 query heads"),
        # A half of 0.5B.
        (ModelShape(2, 896, 7, 1, 64, 512, 320, 1e-6), 1, "bfloat16", "896 x 448 is not made of"),
    ],
)
def test_what_cannot_run_is_refused_with_the_value(
    shape: ModelShape, rows: int, dtype: str, why: str
) -> None:
    assert why in str(kernels.refusal(plan_of(shape), rows, dtype))


@pytest.mark.parametrize(
    ("size", "devices"),
    [("1.5b", {2, 4}), ("3b", {2, 4, 8}), ("7b", {2, 4}), ("14b", {2, 4, 8}), ("32b", {2, 4, 8}),
     ("72b", {2, 4, 8})],
)  # fmt: skip
def test_all_sizes_but_the_smallest_run_on_devices_that_they_divide_by(
    size: str, devices: set[int]
) -> None:
    config = config_of(SIZES[size])
    assert {tp for tp in MeshShape.fitting(config) if tp in (2, 4, 8)} == devices
    for tp in devices:
        assert split_packed.refusal(config, jnp.dtype("bfloat16"), range(tp)) is None


def test_the_smallest_size_is_for_one_device() -> None:
    config, bfloat16 = config_of(SIZES["0.5b"]), jnp.dtype("bfloat16")
    assert {tp for tp in MeshShape.fitting(config) if tp in (2, 4, 8)} == {2}
    why = split_packed.refusal(config, bfloat16, range(2))
    assert why == "a matrix of 896 x 448 is not made of 16 x 128 tiles"


def test_weights_that_no_kernel_takes_are_refused_by_name() -> None:
    why = kernels.refusal(plan_of(SMALL, "float32"), 1, "bfloat16")
    assert why == (
        "the weights are float32, not one of bfloat16, float16, q4_0, q4_1, q5_0, q5_1, q8_0, "
        "q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, int4, int8"
    )
    cut = plan_of(dataclasses.replace(SMALL, ffn=448), "q4_k")
    why = kernels.refusal(cut, 1, "bfloat16")
    assert why == "rows of 448 numbers are not whole blocks of q4_k"
    mixed = StepPlan.alike(SMALL, 132, "float16", *["bfloat16"] * 4)
    assert few_rows.refusal(mixed, 1, "bfloat16") is None
    why = many_rows.refusal(mixed, 17, "bfloat16")
    assert why == "products with bfloat16 and float16 are taken in different formats, of one input"


@pytest.mark.parametrize(
    ("size", "blocks", "rows", "why"),
    [
        ("0.5b", 132, 17, "at most 16 rows, not 17"),
        ("72b", 132, 8, "shared memory has room for"),
        ("14b", 60, 8, "8 rows of 8 key/value heads are more than 60 blocks"),
    ],
)
def test_what_the_kernel_of_few_rows_leaves_to_the_other(
    size: str, blocks: int, rows: int, why: str
) -> None:
    plan = plan_of(SIZES[size], blocks=blocks)
    assert why in str(few_rows.refusal(plan, rows, "bfloat16"))
    assert many_rows.refusal(plan, rows, "bfloat16") is None


@pytest.mark.parametrize("blocks", [1, 7, 114, 132])
@pytest.mark.parametrize("shape", [*SIZES.values(), SMALL, TINY, HALF_72B])
def test_every_m_tile_is_somebodys(shape: ModelShape, blocks: int) -> None:
    """A reader waits for every M-tile of every part: one that is nobody's would hang it."""
    for (out, columns), phase in zip(
        shape.packed_matrices, plan_of(shape, blocks=blocks).phases, strict=True
    ):
        done = np.zeros((phase.parts, out // 16), int)
        for part, first, count in zip(phase.part, phase.first, phase.count, strict=True):
            done[part, first : first + count] += 1
        assert (done == 1).all()
        assert phase.part_begin[0] == 0
        assert phase.part_begin[-1] * 128 == columns
        assert (np.diff(phase.part_begin) > 0).all()


@pytest.mark.parametrize("blocks", [1, 7, 114, 132])
@pytest.mark.parametrize("shape", [*SIZES.values(), SMALL, TINY])
def test_only_blocks_that_layers_make_wait_have_m_tiles_of_the_head(
    shape: ModelShape, blocks: int
) -> None:
    """The others would run ahead and take an early layer's words for the last one's."""
    *layer, head = plan_of(shape, blocks=blocks).phases
    assert (np.sum([phase.count for phase in layer], axis=0)[head.count > 0] > 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_blocks_read_about_as_many_bytes_a_layer(size: str) -> None:
    layer = np.sum([p.count * p.tiles for p in plan_of(SIZES[size]).phases[:4]], axis=0)
    assert layer.max() <= 1.12 * layer.mean()
