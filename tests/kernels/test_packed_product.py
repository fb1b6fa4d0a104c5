"""Products of many rows with the weight stream: the kernel on NumPy, its tiling, its lowering."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import ShapeDtypeStruct

from pallas_kernels import packed_feed_forward, packed_product
from pallas_kernels.decode_step import GATE_UP, HEAD, ModelShape, Packed
from pallas_kernels.packed_product import mosaic_gpu
from pallas_kernels.packed_product.outputs import Outputs
from pallas_kernels.packed_product.pieces import Shape
from pallas_kernels.packed_product.tiling import M_TILES, MOST_ROWS, Tiling
from tests.kernels import hopper
from tests.kernels.emulated_step import (
    SEED,
    SMALL,
    UNEVEN,
    UNEVEN_BLOCKS,
    Case,
    drawn,
    install_pallas,
    relative,
)
from tests.kernels.simt import Machine, Role
from tests.kernels.simt_thread import install
from tests.kernels.streams import matrices
from tests.kernels.test_blocks import as_in_files
from tests.kernels.test_decode_step import SIZES, plan_of

QKV, DOWN = 0, 3
WIDE = ModelShape(1, 256, 4, 2, 64, 640, 272, 1e-6)
"""M-tiles of the head and of gate and up that are no multiple of eight."""
MIXED = ("q4_k", "q6_k", "q2_k", "q4_1", "q8_0")
BUILD = mosaic_gpu._build.__wrapped__


@functools.cache
def case_of(shape: ModelShape, stored: str | tuple[str, ...]) -> Case:
    return drawn(shape, 3, [1], 1, stored, cache="bfloat16")


def emulated(
    patch: pytest.MonkeyPatch,
    case: Case,
    phase: int,
    x: np.ndarray,
    outputs: Outputs,
    tiling: Tiling,
    scales: np.ndarray = mosaic_gpu._UNSCALED,
) -> np.ndarray:
    """What the kernel writes."""
    plan = case.plan
    this, (name,) = plan.phases[phase], {*plan.stored(phase, 0)}
    shape = Shape(name, this.m_tiles, this.across, len(x), phase == GATE_UP, plan.granule_bytes)
    arranged = mosaic_gpu._arranged(jnp.asarray(x), tiling.rows)
    given = (case.packed.stream, plan.at(phase, 0), arranged, scales)
    return launched(patch, shape, tiling, plan.blocks, outputs)(*given)


def launched(
    patch: pytest.MonkeyPatch, shape: Shape, tiling: Tiling, blocks: int, outputs: Outputs
) -> Callable[..., np.ndarray]:
    """A kernel of a stream, where tiles begin in it, arranged inputs and scales."""
    return functools.partial(_launched, patch, (shape, tiling, blocks, outputs))


def _launched(
    patch: pytest.MonkeyPatch, built: tuple[Shape, Tiling, int, Outputs], *given: Any
) -> np.ndarray:
    blocks, made = built[2], []  # type: ignore[var-annotated]

    def kept(body: Callable[..., None], **how: Any) -> Callable[..., None]:
        made.append((body, how))
        return body

    with patch.context() as inner:
        inner.setattr(mosaic_gpu.compat, "kernel", kept)
        BUILD(*built)
        ((body, how),) = made
        (words,) = (each.shape[0] for each in how["scratch_types"])
        # Copies fill all but the barriers.
        machine = Machine(blocks, 4 * words, (0, 4 * words), SEED)
        out = how["out_type"]
        refs = [machine.array(np.asarray(each)) for each in given]
        size = int(np.prod(out.shape)) * out.dtype.itemsize
        y = machine.array(np.random.default_rng(SEED).integers(0, 256, size, np.uint8))
        install(inner, machine)
        install_pallas(inner, machine)
        machine.run(
            [
                (Role(block, first, count), lambda: body(*refs, y, 0))
                for block in range(blocks)
                for first, count in ((0, 256), (256, 32), (288, 96))
            ]
        )
    found: np.ndarray = machine.bytes_at(y).view(out.dtype).reshape(out.shape)
    return found


def run(
    patch: pytest.MonkeyPatch, case: Case, phase: int, x: np.ndarray, dtype: str, tiling: Tiling
) -> np.ndarray:
    """The kernel's product of x, summed up over splits."""
    found = emulated(patch, case, phase, x, Outputs(dtype), tiling)
    return np.asarray(found.astype(np.float64).sum(axis=0))


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("shape", "stored", "phase", "rows", "dtype", "tiling"),
    [
        (SMALL, "bfloat16", QKV, 70, "bfloat16", Tiling(40, 1)),
        (WIDE, "bfloat16", GATE_UP, 24, "bfloat16", Tiling(24, 1)),
        (WIDE, "float16", DOWN, 65, "float32", Tiling(72, 3)),
        (WIDE, "bfloat16", HEAD, 8, "float32", Tiling(8, 2)),
        (SMALL, MIXED, QKV, 20, "float32", Tiling(16, 1)),
        (SMALL, MIXED, 1, 256, "float16", Tiling(256, 1)),
        (SMALL, MIXED, GATE_UP, 33, "float32", Tiling(40, 2)),
        (SMALL, MIXED, DOWN, 9, "float32", Tiling(16, 4)),
        (SMALL, MIXED, HEAD, 17, "float32", Tiling(24, 1)),
    ],
)
def test_products(
    monkeypatch: pytest.MonkeyPatch,
    shape: ModelShape,
    stored: str | tuple[str, ...],
    phase: int,
    rows: int,
    dtype: str,
    tiling: Tiling,
) -> None:
    """Off by what rounding the result takes, and rounding a block's numbers to float16."""
    case = case_of(shape, stored)
    weights = np.asarray(matrices(case.packed, case.plan)[phase, 0], np.float64)
    name = mosaic_gpu.input_dtype(case.plan, phase, 0)
    x = np.random.default_rng(SEED).standard_normal((rows, weights.shape[1])).astype(name)
    found, truth = run(monkeypatch, case, phase, x, dtype, tiling), x.astype(np.float64) @ weights.T
    numbers = stored in ("bfloat16", "float16")
    print(f"seed {SEED}: {relative(found, truth):.2e}")
    rounding = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-21}[dtype]
    assert relative(found, truth) <= rounding + (0 if numbers else 2**-11)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("stored", "rows", "tiling", "outputs"),
    [
        ("bfloat16", 24, Tiling(24, 1), Outputs("bfloat16", gated=True)),
        # Blocks of the next product's input begin within this one's, and end after its rows.
        ("bfloat16", 70, Tiling(40, 1), Outputs("bfloat16", gated=True, arranged=24)),
        ("float16", 20, Tiling(24, 1), Outputs("float32", gated=True, scaled=True)),
        (MIXED, 33, Tiling(16, 1), Outputs("bfloat16", gated=True, scaled=True)),
    ],
)
def test_gated_products(
    monkeypatch: pytest.MonkeyPatch,
    stored: str | tuple[str, ...],
    rows: int,
    tiling: Tiling,
    outputs: Outputs,
) -> None:
    """silu(gate) * up of scaled sums, rounded once, in the order of the next product's input."""
    case = case_of(SMALL, stored)
    weights = np.asarray(matrices(case.packed, case.plan)[GATE_UP, 0], np.float64)
    rng, name = np.random.default_rng(SEED), mosaic_gpu.input_dtype(case.plan, GATE_UP, 0)
    x = rng.standard_normal((rows, weights.shape[1])).astype(name)
    scales = 2.0 ** rng.integers(-2, 3, rows if outputs.scaled else 1).astype(np.float32)
    scales = scales if outputs.scaled else np.ones(1, np.float32)
    found = emulated(monkeypatch, case, GATE_UP, x, outputs, tiling, scales)[0]
    if outputs.arranged:
        names = jnp.arange(rows * len(weights) // 2, dtype=jnp.int32).reshape(rows, -1)
        places = np.asarray(mosaic_gpu._arranged(names + 1, outputs.arranged)).reshape(-1)
        number = np.zeros(names.shape, found.dtype).reshape(-1)
        number[places[places > 0] - 1] = found.reshape(-1)[places > 0]
        found = number.reshape(names.shape)
    gate, up = np.split(x.astype(np.float64) @ weights.T * scales[:, None], 2, axis=1)
    truth = gate / (1 + np.exp(-gate)) * up
    print(f"seed {SEED}: {relative(found.astype(np.float64), truth):.2e}")
    rounding = {"bfloat16": 2**-8, "float32": 2**-19}[outputs.dtype]
    assert relative(found.astype(np.float64), truth) <= rounding + (2**-9 if stored == MIXED else 0)


@pytest.mark.emulated
@pytest.mark.usefixtures("as_if_on_hopper")
@pytest.mark.parametrize("stored", ["bfloat16", ("q4_k", "q6_k", "q4_k", "q5_1", "q8_0")])
@pytest.mark.parametrize("itself", [True, False])
def test_a_feed_forward_that_is_not_whole_tiles(
    monkeypatch: pytest.MonkeyPatch, stored: str | tuple[str, ...], itself: bool
) -> None:
    """What pads it stays inside, be it by a kernel that gates or by one that doesn't."""
    monkeypatch.setattr(mosaic_gpu, "_build", functools.partial(launched, monkeypatch))
    monkeypatch.setattr(mosaic_gpu, "gates_itself", lambda *_: itself)
    case = case_of(UNEVEN if stored == "bfloat16" else UNEVEN_BLOCKS, stored)
    packed, plan, ffn = case.packed, case.plan, case.plan.shape.ffn
    gate_up, down = (
        np.asarray(matrices(packed, plan)[phase, 0], np.float64) for phase in (GATE_UP, DOWN)
    )
    assert (gate_up.shape, down.shape) == ((2 * ffn, 256), (256, ffn))
    x = np.random.default_rng(SEED).standard_normal((20, 256)).astype("bfloat16")
    multiplied: dict[str, Any] = {"implementation": "mosaic_gpu"}
    both = packed_product(packed, plan, GATE_UP, 0, jnp.asarray(x), dtype="float32", **multiplied)
    truth = x.astype(np.float64) @ gate_up.T
    assert both.shape == truth.shape and relative(np.asarray(both), truth) <= 2**-11
    gate, up = np.split(truth, 2, axis=1)
    found = packed_feed_forward(packed, plan, 0, jnp.asarray(x), **multiplied)
    truth = (gate / (1 + np.exp(-gate)) * up) @ down.T
    assert found.shape == truth.shape
    # Four roundings at most, of gate, up, their product and the result, each of 2^-9.
    assert relative(np.asarray(found, np.float64), truth) <= 2**-7


@given(
    m_tiles=st.integers(1, 2400),
    across=st.integers(1, 240),
    rows=st.integers(1, 9000),
    blocks=st.sampled_from([114, 132]),
)
def test_a_tiling_covers_all(m_tiles: int, across: int, rows: int, blocks: int) -> None:
    tiling = Tiling.of(m_tiles, across, rows, blocks)
    assert tiling.rows % 8 == 0 and 8 <= tiling.rows <= MOST_ROWS
    assert 1 <= tiling.splits <= across
    assert tiling.row_blocks(rows) * tiling.rows >= rows
    # No tiling of one piece a block where there is work for all of them.
    pieces = -(-m_tiles // M_TILES) * tiling.row_blocks(rows) * tiling.splits
    assert pieces >= min(blocks // 2, -(-m_tiles // M_TILES))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["bfloat16", "q4_k"])
def test_the_reference(stored: str, dtype: str) -> None:
    case = case_of(SMALL, stored)
    weights = np.asarray(matrices(case.packed, case.plan)[GATE_UP, 1], np.float64)
    x = jnp.asarray(np.random.default_rng(SEED).standard_normal((5, 256)), dtype)
    found = packed_product(case.packed, case.plan, GATE_UP, 1, x)
    assert found.dtype == x.dtype and found.shape == (5, len(weights))
    truth = np.asarray(x, np.float64) @ weights.T
    # Weights are numbers of x's dtype.
    assert relative(np.asarray(found, np.float64), truth) <= {"bfloat16": 2**-7}.get(dtype, 2**-20)


@pytest.mark.parametrize("stored", ["bfloat16", "q4_k"])
def test_the_reference_of_a_feed_forward(stored: str) -> None:
    case = case_of(SMALL, stored)
    both, down = (
        np.asarray(matrices(case.packed, case.plan)[phase, 1], np.float64)
        for phase in (GATE_UP, DOWN)
    )
    x = jnp.asarray(np.random.default_rng(SEED).standard_normal((5, 256)), jnp.float32)
    found = packed_feed_forward(case.packed, case.plan, 1, x)
    gate, up = np.split(np.asarray(x, np.float64) @ both.T, 2, axis=1)
    truth = (gate / (1 + np.exp(-gate)) * up) @ down.T
    assert found.dtype == x.dtype and relative(np.asarray(found, np.float64), truth) <= 2**-19


def test_wrong_columns_are_refused() -> None:
    case = case_of(SMALL, "bfloat16")
    with pytest.raises(ValueError, match="256 columns"):
        packed_product(case.packed, case.plan, QKV, 0, jnp.zeros((3, 128)))


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
@pytest.mark.parametrize("rows", [65, 2048])
@pytest.mark.parametrize(("size", "stored"), [("0.5b", "bfloat16"), ("0.5b", "q8_0"),
                                              ("7b", "bfloat16"), ("7b", "q4_k_m")])  # fmt: skip
def test_lowering(size: str, stored: str, rows: int) -> None:
    plan = as_in_files(size, stored) if stored.endswith("_m") else plan_of(SIZES[size], stored)

    def products(stream: Any, offsets: Any, x: Any, *inputs: Any) -> list[Any]:
        packed = Packed(stream, stream, stream, offsets)
        kernel: dict[str, Any] = {"implementation": "mosaic_gpu"}
        return [
            packed_feed_forward(packed, plan, 0, x, **kernel),
            *(packed_product(packed, plan, n, 0, x, **kernel) for n, x in enumerate(inputs)),
        ]

    stream = ShapeDtypeStruct(plan.stream_shape, jnp.uint32)
    offsets = tuple(ShapeDtypeStruct(each.shape, jnp.int32) for each in plan.tile_offsets)
    columns = [plan.shape.hidden, *(columns for _, columns in plan.shape.matrices)]
    inputs = [ShapeDtypeStruct((rows, each), jnp.bfloat16) for each in columns]
    assert "packed_product" in hopper.lower(products, stream, offsets, *inputs)
