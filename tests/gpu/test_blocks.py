"""A decode step on files' own blocks, on a GPU: beside the same weights in bfloat16."""

import itertools

import jax
import numpy as np
import pytest

from pallas_kernels.decode_step import ModelShape, StepPlan, Stored, decode_step
from tests.kernels.emulated_step import SEED, drawn, expected, poisoned, relative
from tests.kernels.streams import stored_again

# Layers of real shapes with a small vocabulary.
SHAPES = {
    "small": ModelShape(2, 256, 4, 2, 64, 512, 1024, 1e-6),
    "0.5b": ModelShape(3, 896, 14, 2, 64, 4864, 2048, 1e-6),
    "1.5b": ModelShape(2, 1536, 12, 2, 128, 8960, 2048, 1e-6),
    "7b": ModelShape(1, 3584, 28, 4, 128, 18944, 2048, 1e-6),
    # 21.5 tiles of the feed-forward.
    "3b, a fourth": ModelShape(2, 2048, 4, 1, 128, 2752, 2048, 1e-6),
}


MIXES = {
    "q8_0": ["q8_0"] * 5,
    "q4_k": ["q4_k"] * 5,
    "k": ["q2_k", "q3_k", "q5_k", "q6_k", "q4_k"],
    "simple": ["q4_1", "q5_1", "q4_0", "q5_0", "iq4_nl"],
    "others": ["iq4_xs", "q6_k", "q3_k", "q2_k", "iq4_xs"],
    "integers": ["int4", "int8", "int8", "int4", "int4"],
    "0.5b": ["q5_0", "q5_0", "q5_0", "q4_k", "q8_0"],
    "72b": ["q4_k", "q4_k", "q4_k", "q5_0", "q6_k"],
}


def plan_of(name: str, mix: str) -> StepPlan:
    """The mix; of "layers" another in every second layer, and other values than queries."""
    shape, blocks = SHAPES[name], jax.local_devices()[0].core_count
    if mix != "layers":
        return StepPlan.alike(shape, blocks, *MIXES[mix])
    usual = Stored("q4_k", "q4_k", "q4_k", "q4_k", "q4_k", "q4_k")
    more = usual._replace(v="q6_k", down="q6_k")
    return StepPlan(shape, blocks, (usual, more)[: shape.layers], "q6_k")


@pytest.mark.parametrize(
    ("name", "mix", "rows"),
    [
        *itertools.product(
            ["small"], ["q8_0", "k", "simple", "others", "layers"], [1, 3, 5, 11, 17]
        ),
        *itertools.product(
            ["1.5b"], ["q8_0", "k", "simple", "others", "layers"], [1, 3, 8, 12, 40]
        ),
        *itertools.product(["0.5b"], ["q8_0", "simple", "0.5b"], [1, 3, 5, 11, 64]),
        *itertools.product(["1.5b"], ["integers"], [1, 5, 40]),
        *itertools.product(["7b"], ["q8_0", "q4_k", "layers"], [1, 3, 5, 64]),
        *itertools.product(["3b, a fourth"], ["72b", "simple"], [1, 5, 64]),
    ],
)
def test_less_wrong_than_bfloat16(name: str, mix: str, rows: int) -> None:
    """With a cache in float16: what bfloat16 loses of keys would be most of either error."""
    positions = [1 + 977 * n % 700 for n in range(rows)]
    plan = plan_of(name, mix)
    case = drawn(plan.shape, plan.blocks, positions, 8, plan, cache="float16")
    packed, plan = stored_again(case.packed, case.plan, "bfloat16")
    truth = expected(case, exact=True)
    rounded = expected(case._replace(packed=packed, plan=plan))
    step = jax.jit(decode_step, static_argnames=("plan", "implementation"))
    inputs = case._asdict() | {"pages": poisoned(case), "implementation": "mosaic_gpu"}
    ours, again = (step(**inputs) for _ in range(2))
    for mine, same, theirs, right in zip(ours, again, rounded, truth, strict=True):
        assert np.array_equal(mine, same)
        error, of_rounded = (relative(np.asarray(x, np.float64), right) for x in (mine, theirs))
        print(f"seed {SEED}, {name}, {mix}: blocks {error:.2e}, rounded {of_rounded:.2e}")
        assert error <= of_rounded
