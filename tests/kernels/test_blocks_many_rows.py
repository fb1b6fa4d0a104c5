"""Weights in a file's blocks in the kernel of many rows, run without a GPU."""

import pytest

from pallas_kernels.decode_step import ModelShape, StepPlan
from pallas_kernels.decode_step.many_rows import mosaic_gpu as many_rows
from tests.kernels.emulated_step import (
    GROUPS,
    ODD,
    SMALL,
    TURNS,
    UNEVEN_BLOCKS,
    check_beside,
    drawn,
)
from tests.kernels.test_blocks import MIXED, SHAPE

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize(
    ("shape", "blocks", "positions", "stored"),
    [
        # A row is shared by several blocks, and a warp has several M-tiles.
        (
            ODD,
            20,
            [300, 17, 200, 3, 129, *range(40, 51)],
            ("q5_1", "iq4_nl", "q4_1", "q4_0", "q5_0"),
        ),
        # So many M-tiles that they are multiplied in turns, 13 and 12.
        (TURNS, 2, [7] * 20, "q8_0"),
        (SMALL, 5, [0, 21, 7, 9, 3, *range(30, 41)], ("q6_k", "q4_k", "iq4_xs", "float16", "q3_k")),
        (GROUPS[8], 11, [*range(64)], ("q4_k", "q6_k", "q5_k", "q4_1", "q2_k")),
        # Segments and layers that are stored otherwise.
        (SHAPE, 7, [3, 40, 17, *range(50, 63)], MIXED),
        (SMALL, 11, [3, 9, 7, *range(20, 33)], ("int4", "int8", "int8", "int4", "q6_k")),
        (UNEVEN_BLOCKS, 9, [40, 3, *range(14)], ("q8_0", "q4_k", "q6_k", "q5_0", "q8_0")),
    ],
)
def test_no_worse_than_weights_in_float16(
    monkeypatch: pytest.MonkeyPatch,
    shape: ModelShape,
    blocks: int,
    positions: list[int],
    stored: str | tuple[str, ...] | StepPlan,
) -> None:
    """Of sixteen rows at least: errors of a few are larger or smaller than most by half."""
    case = drawn(shape, blocks, positions, 3, stored, cache="float16")
    check_beside(monkeypatch, case, many_rows, "float16")
