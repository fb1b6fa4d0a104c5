"""A decode step on a Q8_0 file's own blocks, on a GPU: beside the same weights in bfloat16."""

import jax
import numpy as np
import pytest

from pallas_kernels.decode_step import ModelShape, decode_step
from tests.kernels.emulated_step import SEED, drawn, expected, poisoned, relative
from tests.kernels.streams import stored_again

# Layers of real shapes with a small vocabulary.
SHAPES = {
    "small": ModelShape(2, 256, 4, 2, 64, 512, 1024, 1e-6),
    "0.5b": ModelShape(3, 896, 14, 2, 64, 4864, 2048, 1e-6),
    "1.5b": ModelShape(2, 1536, 12, 2, 128, 8960, 2048, 1e-6),
    "7b": ModelShape(1, 3584, 28, 4, 128, 18944, 2048, 1e-6),
}


@pytest.mark.parametrize("rows", [1, 3, 5, 11])
@pytest.mark.parametrize("name", SHAPES)
def test_less_wrong_than_bfloat16(name: str, rows: int) -> None:
    positions = [1 + 977 * n % 700 for n in range(rows)]
    blocks = jax.local_devices()[0].core_count
    case = drawn(SHAPES[name], blocks, positions, 8, "q8_0", cache="bfloat16")
    packed, plan = stored_again(case.packed, case.plan, "bfloat16")
    truth = expected(case, exact=True)
    rounded = expected(case._replace(packed=packed, plan=plan))
    step = jax.jit(decode_step, static_argnames=("plan", "implementation"))
    inputs = case._asdict() | {"pages": poisoned(case), "implementation": "mosaic_gpu"}
    ours, again = (step(**inputs) for _ in range(2))
    for mine, same, theirs, right in zip(ours, again, rounded, truth, strict=True):
        assert np.array_equal(mine, same)
        error, of_rounded = (relative(np.asarray(x, np.float64), right) for x in (mine, theirs))
        print(f"seed {SEED}, {name}, {rows} rows: blocks {error:.2e}, rounded {of_rounded:.2e}")
        assert error <= of_rounded
