"""Products of many rows with the weight stream on a GPU, beside NumPy's in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packed_feed_forward, packed_product
from pallas_kernels.decode_step import GATE_UP, HEAD, StepPlan
from tests.gpu.test_blocks import SHAPES, plan_of
from tests.kernels.emulated_step import SEED, drawn, relative
from tests.kernels.streams import matrices

QKV, O_PROJ, DOWN = 0, 1, 3
ROUNDED = 2**-8
"""What rounding a result to bfloat16 may take."""


@functools.cache
def case_of(name: str, mix: str):
    blocks = jax.local_devices()[0].core_count
    plan = StepPlan.uniform(SHAPES[name], blocks, mix) if "float" in mix else plan_of(name, mix)
    case = drawn(plan.shape, plan.blocks, [1], 1, plan, cache="bfloat16")
    return case, {at: np.asarray(w, np.float64) for at, w in matrices(case.packed, plan).items()}


def inputs(rows: int, columns: int) -> jax.Array:
    """Of very different rows: powers of two are taken out of them where weights are in blocks."""
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((rows, columns), np.float32) * 2.0 ** rng.integers(-9, 9, (rows, 1))
    return jnp.asarray(x, jnp.bfloat16)


CASES = [
    *((name, mix, rows) for name in ("small", "0.5b") for mix in ("bfloat16", "q8_0")
      for rows in (65, 200, 512)),
    ("0.5b", "0.5b", 256), ("1.5b", "layers", 96), ("1.5b", "k", 300), ("1.5b", "float16", 128),
    ("3b, a fourth", "bfloat16", 200), ("3b, a fourth", "72b", 96),
    ("7b", "bfloat16", 256), ("7b", "bfloat16", 2048), ("7b", "q4_k", 512),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mix", "rows"), CASES)
def test_products(name: str, mix: str, rows: int) -> None:
    case, weights = case_of(name, mix)
    for phase in (QKV, O_PROJ, GATE_UP, DOWN, HEAD):
        layer = 0 if phase == HEAD else case.plan.shape.layers - 1
        x = inputs(rows, weights[phase, layer].shape[1])
        run = jax.jit(
            functools.partial(packed_product, plan=case.plan, phase=phase, layer=layer,
                              implementation="mosaic_gpu")
        )  # fmt: skip
        found = np.asarray(run(case.packed, x=x), np.float64)
        truth = np.asarray(x, np.float64) @ weights[phase, layer].T
        errors = [relative(*each) for each in zip(found, truth, strict=True)]
        print(f"{phase=} {max(errors):.2e} ({SEED=})")
        assert max(errors) <= ROUNDED


@pytest.mark.parametrize(("name", "mix", "rows"), CASES)
def test_feed_forward(name: str, mix: str, rows: int) -> None:
    """Within what rounding silu(gate) * up and the result may take, each row for itself."""
    case, weights = case_of(name, mix)
    layer = case.plan.shape.layers - 1
    x = inputs(rows, case.plan.shape.hidden)
    run = jax.jit(
        functools.partial(
            packed_feed_forward, plan=case.plan, layer=layer, implementation="mosaic_gpu"
        )
    )
    found = np.asarray(run(case.packed, x=x), np.float64)
    gate, up = np.split(np.asarray(x, np.float64) @ weights[GATE_UP, layer].T, 2, axis=1)
    truth = (gate / (1 + np.exp(-gate)) * up) @ weights[DOWN, layer].T
    errors = [relative(*each) for each in zip(found, truth, strict=True)]
    print(f"{max(errors):.2e} ({SEED=})")
    assert max(errors) <= 2 * ROUNDED
