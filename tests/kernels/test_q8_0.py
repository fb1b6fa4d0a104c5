"""Q8_0 in the weight stream: a file's blocks there and back, and whole steps multiplied by them."""

import re

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_step import (
    HEAD,
    ModelShape,
    Packed,
    StepPlan,
    alike,
    empty_stream,
    kernels,
    put_matrix,
    tile_offsets,
)
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few_rows
from pallas_kernels.decode_step.many_rows import mosaic_gpu as many_rows
from pallas_kernels.decode_step.packed import unpack
from pallas_kernels.decode_step.ptx import arithmetic
from pallas_kernels.decode_step.ptx.thread import V
from tests.kernels.emulated_step import (
    GROUPS,
    ODD,
    SEED,
    SMALL,
    TINY,
    Case,
    check,
    drawn,
    expected,
    relative,
    run,
    without_barriers,
)
from tests.kernels.float64_step import exact_step
from tests.kernels.simt import Race
from tests.kernels.streams import stored_again
from tests.kernels.test_decode_step import SIZES, lower, plan_of

SHAPE = ModelShape(2, 256, 4, 2, 64, 384, 320, 1e-6)
HEAD_ONLY = ModelShape(0, 1024, 2, 1, 64, 256, 512, 1e-6)
"""No layers: embeddings, a norm and a product."""


@pytest.mark.parametrize("others", ["q8_0", "bfloat16"])
@pytest.mark.parametrize("blocks", [1, 7])
def test_blocks_are_read_back_bit_by_bit(blocks: int, others: str) -> None:
    """Any bytes: scales that are NaN, infinite, subnormal and negative all occur."""
    plan, rng = StepPlan(SHAPE, blocks, (*alike(others)[1:], "q8_0")), np.random.default_rng(SEED)
    stream, offsets = empty_stream(plan), tile_offsets(plan)
    right = {}
    for phase, (out, columns) in enumerate(SHAPE.matrices):
        stored = plan.stored[phase]
        for layer in range(1 if phase == HEAD else SHAPE.layers):
            if stored == "q8_0":
                given = rng.integers(0, 256, (out, columns // 32 * 34), np.uint8)
                with np.errstate(all="ignore"):
                    value = gguf.quants.dequantize(given, gguf.GGMLQuantizationType.Q8_0)
            else:
                value = given = rng.standard_normal((out, columns), np.float32).astype(stored)
            stream = put_matrix(stream, offsets[phase], given, layer, phase, stored)
            right[phase, layer] = np.asarray(value)
    packed = Packed(stream, stream, stream, offsets)
    for (phase, layer), value in right.items():
        assert same(packed.matrix(plan, phase, layer), value)
    tokens = np.asarray([319, 15, 16, 7, 8, 319, 0, 64])
    assert same(packed.embeddings(plan, jnp.asarray(tokens)), right[HEAD, 0][tokens])


def same(found: object, right: np.ndarray) -> bool:
    """The same bits; a NaN is a NaN."""
    ours = np.asarray(found)
    assert ours.dtype == right.dtype
    nan = np.isnan(right)
    return bool((np.isnan(ours) == nan).all() and ours[~nan].tobytes() == right[~nan].tobytes())


def test_the_instructions_make_float16_of_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the emulated tests leave out, one by one as PTX defines them."""
    texts: list[str] = []
    monkeypatch.setattr(arithmetic, "asm", lambda text, *_: texts.append(text))
    monkeypatch.setattr(arithmetic, "i32", lambda: None)
    arithmetic.signed_bytes(V(None))
    every = np.arange(256, dtype=np.uint8)
    registers = {"$2": every.view(np.uint32)}

    def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        eight = np.stack([a, b], axis=1).view(np.uint8)
        picked = [eight[:, int(selector[0]) >> (4 * n) & 7] for n in range(4)]
        return np.stack(picked, axis=1).view(np.uint32)[:, 0]

    def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a.view(np.float16) - b.view(np.float16)).view(np.uint32)

    codes = {"mov.b32": lambda a: a, "prmt.b32": permuted, "sub.rn.f16x2": difference}
    for name, operands in re.findall(r"(mov\.b32|prmt\.b32|sub\.rn\.f16x2) ([^;]+);", texts[0]):
        out, *given = operands.split(", ")
        words = [
            registers[x] if x in registers else np.full(64, int(x, 16), np.uint32) for x in given
        ]
        registers[out] = codes[name](*words)
    found = np.stack([registers["$0"], registers["$1"]], axis=1).view(np.float16)
    assert np.array_equal(found.reshape(-1), every.astype(np.float32) - 128)


def in_bfloat16(case: Case) -> Case:
    """The same weights rounded, as the file is loaded today."""
    packed, plan = stored_again(case.packed, case.plan, "bfloat16")
    return case._replace(plan=plan, packed=packed)


@pytest.mark.parametrize(
    ("shape", "blocks", "positions", "stored"),
    [
        (SMALL, 5, [100], "q8_0"),
        (ODD, 6, [300, 17, 9], "q8_0"),
        (GROUPS[1], 11, [3, 50, 7, 31, 32], "q8_0"),
        (TINY, 16, [*range(16)], "q8_0"),
        # Queries, keys and values as the head; a granule of the stream is 128 bytes.
        (SMALL, 7, [5, 40], ("bfloat16", "q8_0", "float16", "q8_0", "bfloat16")),
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
    check(monkeypatch, case, few_rows)
    truth, ours = exact_step(case), run(monkeypatch, case, SEED)
    rounded = expected(in_bfloat16(case))
    for mine, theirs, right in zip(ours, rounded, truth, strict=True):
        error, of_rounded = relative(mine, right), relative(theirs, right)
        print(f"seed {SEED}: blocks {error:.2e}, rounded {of_rounded:.2e}")
        assert error <= of_rounded


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_a_product_by_itself_is_as_exact_as_float32(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Nothing of it is rounded to 16 bits: not a weight, and of an input 22 bits stay."""
    case = drawn(HEAD_ONLY, 16, [0] * rows, 1, "q8_0", cache="bfloat16")
    truth, ours = exact_step(case)[0], run(monkeypatch, case, SEED)[0]
    print(f"seed {SEED}: {relative(ours, truth):.2e}")
    assert relative(ours, truth) <= 2**-21


def test_a_missing_barrier_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = drawn(SMALL, 5, [100], 2, "q8_0", cache="bfloat16")
    with pytest.raises(Race):
        run(monkeypatch, case, SEED, without_barriers)


@pytest.mark.parametrize(
    ("size", "rows"),
    [(size, rows) for size in ("0.5b", "1.5b", "7b") for rows in (1, 4, 16)],
)
def test_lowers_at_real_sizes(size: str, rows: int) -> None:
    if why := few_rows.refusal(plan_of(SIZES[size], "q8_0"), rows, "bfloat16"):
        pytest.skip(why)
    assert "decode_step" in lower(SIZES[size], rows, 1024, "q8_0", cache="bfloat16")


def test_what_does_not_take_blocks_says_so() -> None:
    plan = plan_of(SIZES["0.5b"], "q8_0")
    assert many_rows.refusal(plan, 17, "bfloat16") == "it takes weights of 16 bits, not q8_0"
    assert kernels.refusal(plan, 17, "bfloat16") == "it takes weights of 16 bits, not q8_0"
    assert kernels.refusal(plan, 16, "bfloat16") is None
    why = "it makes no float32 of weights stored as q8_0"
    assert unpack.refusal(plan, 0, jnp.dtype(jnp.float32)) == why
    assert unpack.refusal(plan, 0, jnp.dtype(jnp.bfloat16)) is None
