"""A file's blocks in the weight stream: there and back, and whole steps multiplied by them."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_step import (
    HEAD,
    ModelShape,
    Packed,
    StepPlan,
    Stored,
    empty_stream,
    kernels,
    tile_offsets,
)
from pallas_kernels.decode_step.common.cache import Pool
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few_rows
from pallas_kernels.decode_step.many_rows import mosaic_gpu as many_rows
from pallas_kernels.decode_step.packed.blocks import Blocks
from pallas_kernels.decode_step.packed.storages import STORAGES
from pallas_kernels.decode_step.ptx import arithmetic
from pallas_kernels.decode_step.ptx.thread import V
from tests.kernels.emulated_step import (
    GROUPS,
    ODD,
    SEED,
    SMALL,
    TINY,
    UNEVEN_BLOCKS,
    Case,
    drawn,
    expected,
    relative,
    run,
    without_barriers,
)
from tests.kernels.float64_step import exact_step
from tests.kernels.simt import Race
from tests.kernels.streams import anything, matrices, put, same, stored_again
from tests.kernels.test_decode_step import SIZES, lower, plan_of

SHAPE = ModelShape(3, 256, 4, 2, 64, 384, 320, 1e-6)
HEAD_ONLY = ModelShape(0, 1024, 4, 1, 64, 256, 512, 1e-6)
"""No layers: embeddings, a norm and a product."""


MIXED = StepPlan(
    SHAPE,
    7,
    (
        Stored("q4_k", "q4_k", "q6_k", "q4_k", "q4_k", "q5_0"),
        Stored("q4_k", "q4_k", "q4_k", "q5_k", "q4_k", "q8_0"),
        Stored("q4_k", "q8_0", "q4_k", "q4_k", "q2_k", "q5_0"),
    ),
    "q6_k",
)
"""As files mix them, by layer and by q, k and v; a granule of the stream is 32 bytes."""

BLOCKS = [name for name, storage in STORAGES.items() if isinstance(storage, Blocks)]


@pytest.mark.parametrize("stored", BLOCKS)
def test_formats_are_read_back_bit_by_bit(stored: str) -> None:
    """Any bytes: scales that are NaN, infinite, subnormal and negative all occur."""
    storage = STORAGES[stored]
    given, right = anything(np.random.default_rng(SEED), stored, 16 * 40, 512)
    pieces = given.reshape(40, 16, 4 // storage.tiles, -1).swapaxes(1, 2)
    words = jax.jit(storage.words)(pieces.reshape(-1, 16, pieces.shape[-1]))
    words = words.reshape(160, -1)
    assert 4 * words.shape[1] == storage.tile_bytes
    found = jax.jit(storage.numbers)(words).reshape(40, 4, 16, 128).swapaxes(1, 2)
    assert same(found.reshape(right.shape), right)


def test_zeros_are_zero() -> None:
    """Zero bytes are in every format, as they pad matrices."""

    @jax.jit
    def stored() -> dict[str, jax.Array]:
        found = {}
        for name, each in STORAGES.items():
            dtype = jnp.uint8 if isinstance(each, Blocks) else each.dtype
            found[name] = each.numbers(
                each.words(jnp.zeros((1, 16, each.piece), dtype)).reshape(each.tiles, -1)
            )
        return found

    for name, numbers in stored().items():
        assert numbers.shape == (STORAGES[name].tiles, 16, 128)
        assert not np.asarray(numbers).any()


@pytest.mark.parametrize(
    "plan",
    [MIXED, *(StepPlan.alike(SHAPE, n, *["bfloat16"] * 4, "q8_0") for n in (1, 7))],
    ids=["mixed", "1", "7"],
)
def test_a_stream_is_read_back_bit_by_bit(plan: StepPlan) -> None:
    rng = np.random.default_rng(SEED)
    stream, right = empty_stream(plan), {}
    for phase, (_, columns) in enumerate(SHAPE.matrices):
        for layer in range(1 if phase == HEAD else SHAPE.layers):
            values = []
            for segment, name in enumerate(plan.stored(phase, layer)):
                tiles = plan.tiles_of(phase, segment)
                rows = (tiles.stop - tiles.start) // plan.phases[phase].across * 16
                given, value = anything(rng, name, rows, columns)
                stream = put(plan, stream, given, phase, layer, segment)
                values.append(value)
            right[phase, layer] = np.concatenate(values)
    packed = Packed(stream, stream, stream, tile_offsets(plan))
    found = matrices(packed, plan)
    assert found.keys() == right.keys()
    for which, value in right.items():
        assert same(found[which], value)
    tokens = np.asarray([319, 15, 16, 7, 8, 319, 0, 64])
    assert same(packed.embeddings(plan, jnp.asarray(tokens)), right[HEAD, 0][tokens])


HALVES = {"$2": 0x2C002C00, "$3": 0xD480D480}
"""1 / 16 and -72."""


@pytest.mark.parametrize(
    ("code", "constants"),
    [
        (lambda a, b: arithmetic.permuted(a, b, 0x4140), {"$3": 0x4140}),
        (lambda a, b: arithmetic.placed(a, 0xF000F, b), {"$2": 0xF000F}),
        (lambda a, b: arithmetic.scaled_halves(a, 1, -1152), {"$2": 0xE480E480}),
        (
            lambda a, b: arithmetic.scaled_halves(a, 1 / 16, -72),
            HALVES,
        ),
    ],
)
def test_instructions_have_their_operands_in_order(
    monkeypatch: pytest.MonkeyPatch, code: Any, constants: dict[str, int]
) -> None:
    """What the emulated tests leave out: PTX's text, and float16 constants."""
    given: list[Any] = []

    def emitted(text: str, kinds: Any, constraints: str, *operands: Any) -> list[V]:
        given.extend([text, *operands])
        return [V(None)]

    monkeypatch.setattr(arithmetic, "asm", emitted)
    monkeypatch.setattr(arithmetic, "i32", lambda: None)
    monkeypatch.setattr(arithmetic, "integer", lambda value: value)
    code("a", "b")
    text, *operands = given
    name, places = text.removesuffix(";").split(" ", 1)
    assert places.removesuffix(", 0xEA").split(", ") == [f"${n}" for n in range(1 + len(operands))]
    assert name in {"prmt.b32", "lop3.b32", "add.rn.f16x2", "fma.rn.f16x2"} and operands[0] == "a"
    for place, value in constants.items():
        assert operands[int(place[1]) - 1] % 2**32 == value


def in_bfloat16(case: Case) -> Case:
    """The same weights rounded, as the file is loaded today."""
    packed, plan = stored_again(case.packed, case.plan, "bfloat16")
    return case._replace(plan=plan, packed=packed)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("shape", "blocks", "positions", "stored"),
    [
        (ODD, 6, [300, 17, 9], "q8_0"),
        (GROUPS[1], 11, [3, 50, 7, 31, 32], "q8_0"),
        (TINY, 16, [*range(16)], "q8_0"),
        # Queries, keys and values as the head; a granule of the stream is 128 bytes.
        (SMALL, 7, [5, 40], ("bfloat16", "q8_0", "float16", "q8_0", "bfloat16")),
        (ODD, 6, [40, 0, 9], ("q5_1", "iq4_nl", "q4_1", "q4_0", "q5_0")),
        (SMALL, 11, [9, 11, 130, 7, 6], ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")),
        (SMALL, 5, [0, 21], ("q6_k", "q4_k", "iq4_xs", "q2_k", "q3_k")),
        (SHAPE, 7, [3, 40, 17], MIXED),
        (SMALL, 11, [3, 9], ("int4", "int8", "int4", "q4_k", "int8")),
        (UNEVEN_BLOCKS, 7, [40, 3], ("q8_0", "q4_k", "q4_k", "q5_1", "q6_k")),
        (UNEVEN_BLOCKS, 6, [9], ("q8_0", "q8_0", "int4", "int8", "q8_0")),
    ],
)
def test_whole_steps(
    monkeypatch: pytest.MonkeyPatch,
    shape: ModelShape,
    blocks: int,
    positions: list[int],
    stored: str | tuple[str, ...],
) -> None:
    """Errors beside those of weights rounded to bfloat16, from float64 on what the file says."""
    case = drawn(shape, blocks, positions, 3, stored, cache="bfloat16")
    ours, truth = run(monkeypatch, case, SEED), exact_step(case)
    rounded = expected(in_bfloat16(case))
    for mine, theirs, right in zip(ours, rounded, truth, strict=True):
        error, of_rounded = relative(mine, right), relative(theirs, right)
        print(f"seed {SEED}: blocks {error:.2e}, rounded {of_rounded:.2e}")
        assert error <= of_rounded


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("rows", "stored"),
    [(1, "q8_0"), (5, "q8_0"), (16, "q8_0"), (1, "q2_k"), (5, "q4_k"), (16, "q5_1")],
)
def test_a_product_by_itself_is_as_exact_as_float32(
    monkeypatch: pytest.MonkeyPatch, rows: int, stored: str
) -> None:
    """Nothing of it is rounded to 16 bits: not a weight, and of an input 22 bits stay."""
    case = drawn(HEAD_ONLY, 16, [0] * rows, 1, stored, cache="bfloat16")
    truth, ours = exact_step(case)[0], run(monkeypatch, case, SEED)[0]
    print(f"seed {SEED}: {relative(ours, truth):.2e}")
    assert relative(ours, truth) <= 2**-21


@pytest.mark.emulated
def test_a_missing_barrier_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = drawn(SMALL, 5, [100], 2, "q8_0", cache="bfloat16")
    with pytest.raises(Race):
        run(monkeypatch, case, SEED, without_barriers)


def as_in_files(size: str, quantisation: str) -> StepPlan:
    """How llama.cpp's quantisations mix formats: of half the layers v and down have more bits, and
    rows that are not whole blocks of 256 have blocks of 32.
    """
    shape = SIZES[size]
    most, more, wide, wider = {
        "q4_k_m": ("q4_k", "q6_k", "q5_0", "q8_0"),
        "q5_k_m": ("q5_k", "q6_k", "q5_1", "q8_0"),
        "q3_k_m": ("q3_k", "q5_k", "iq4_nl", "q5_1"),
    }[quantisation]
    odd, down_odd = shape.hidden % 256 != 0, shape.ffn % 256 != 0
    usual, rest = (wide, wider) if odd else (most, more)
    down, down_more = (wide, wider) if down_odd else (most, more)
    layers = tuple(
        Stored(usual, usual, rest, usual, usual, down_more)
        if i % 2
        else Stored(usual, usual, usual, usual, usual, down)
        for i in range(shape.layers)
    )
    return StepPlan(shape, 132, layers, "q8_0" if odd else "q6_k")


@pytest.mark.lower
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("size", SIZES)
def test_mixed_files_lower(size: str, rows: int) -> None:
    plan = as_in_files(size, ["q4_k_m", "q5_k_m", "q3_k_m"][rows % 3])
    kernel = many_rows if few_rows.refusal(plan, rows, "bfloat16") else few_rows
    assert rows > 1 or kernel is few_rows
    assert "decode_step" in lower(plan, rows, 1024, kernel, cache="bfloat16")


def test_a_warp_multiplies_what_is_stored_alike() -> None:
    """Queries and values of one phase, of which a warp has several M-tiles."""
    shape = ModelShape(1, 256, 8, 2, 64, 256, 256, 1e-6)
    plan = StepPlan(shape, 4, (Stored("q4_k", "q4_k", "q6_k", "q4_k", "q4_k", "q4_k"),), "q6_k")
    why = many_rows.refusal(plan, 17, "bfloat16")
    assert why == "a warp has 2 M-tiles of a phase whose segments are stored otherwise"
    assert many_rows.refusal(StepPlan(shape, 6, plan.layers, "q6_k"), 17, "bfloat16") is None


@pytest.mark.parametrize(("rows", "kernel"), [(9, few_rows), (10, many_rows), (64, many_rows)])
def test_blocks_stay_in_the_kernel_of_few_rows_as_far_as_it_goes(
    monkeypatch: pytest.MonkeyPatch, rows: int, kernel: types.ModuleType
) -> None:
    built = []
    for module in (few_rows, many_rows):
        monkeypatch.setattr(module, "build", lambda *_, module=module: built.append(module))
    kernels.build(plan_of(SIZES["7b"], "q4_k"), rows, Pool(64, 128, 2), jnp.dtype("bfloat16"))
    assert built == [kernel]


def test_what_does_not_take_blocks_says_so() -> None:
    plan = plan_of(SIZES["0.5b"], "q8_0")
    assert kernels.refusal(plan, 65, "bfloat16") == "it takes at most 64 rows, not 65"
