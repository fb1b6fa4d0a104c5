"""The kernel of many rows run without a GPU, as that of few rows is in `test_decode_step_runs`."""

import numpy as np
import pytest

from pallas_kernels.decode_step.many_rows import mosaic_gpu as many_rows
from pallas_kernels.decode_step.many_rows import side_warps
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from tests.kernels.emulated_step import (
    GROUPS,
    ODD,
    PARTS,
    SEED,
    SMALL,
    TURNS,
    UNEVEN,
    Inputs,
    check,
    check_size,
    drawn,
    expected,
    relative,
    run,
    without_barriers,
)
from tests.kernels.float64_step import exact_step
from tests.kernels.simt import Deadlock, Race

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize(
    "inputs",
    [
        (SMALL, 9, [*range(17)], 1, "bfloat16"),
        (SMALL, 5, [255, *range(24)], 2, "float16"),
        # A row is shared by several blocks, and a warp has several M-tiles.
        (ODD, 20, [300, 17, 200, 3, 129], 256, "bfloat16"),
        # So many M-tiles that they are multiplied in turns, 13 and 12.
        (TURNS, 2, [7] * 20, 1, "float16"),
        # The parts of the down projection are two tiles and one; more blocks than heads.
        (PARTS, 15, [3, 9, 20, 31, 63], 1, "bfloat16"),
        # The only one that finds an input's stage filled before it was read.
        (GROUPS[8], 11, [*range(64)], 1, "bfloat16"),
        (UNEVEN, 9, [40, 3, 9, 20, 31], 1, "bfloat16"),
    ],
)
def test_many_rows(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    check(monkeypatch, drawn(*inputs), many_rows)


def test_the_cache_has_a_dtype_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    case = drawn(SMALL, 9, [*range(17)], 1, "bfloat16", cache="float16")
    check(monkeypatch, case, many_rows)


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_float16_takes_hidden_states_of_any_size(
    monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    """Embeddings, which are not scaled, end at 65504."""
    check_size(monkeypatch, size, [20, 3, 1, 0, 7], many_rows)


def test_float16_takes_hidden_states_that_grow_a_millionfold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer's down projection makes numbers of which 16 bits have none so large."""
    case = drawn(SMALL, 5, [3, 20, 7], 1, "float16")
    down = case.plan.at(3, 0)
    stream = case.packed.stream.copy()
    larger = np.clip(stream[down].view(np.float16).astype(np.float32) * 2e5, -6e4, 6e4)
    stream[down] = larger.astype(np.float16).view(np.uint32)
    case = case._replace(packed=case.packed._replace(stream=stream))
    truth, xla = exact_step(case), expected(case)
    found = run(monkeypatch, case, SEED, kernel=many_rows)
    assert relative(found[0], truth[0]) <= 2 * relative(xla[0], truth[0])


class TestWhatIsFound:
    """Mistakes put into the kernel."""

    CASE = (SMALL, 5, [100], 2)

    def test_a_missing_barrier(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(Race):
            run(monkeypatch, drawn(*self.CASE), SEED, without_barriers, many_rows)

    def test_a_block_that_does_not_wait_for_the_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def alter(patch: pytest.MonkeyPatch) -> None:
            patch.setattr(barriers, "await_count", lambda counter, count: None)

        case = drawn(*self.CASE)
        right = run(monkeypatch, case, SEED, kernel=many_rows)
        wrong = run(monkeypatch, case, SEED, alter, many_rows)
        assert not np.array_equal(right[0], wrong[0])

    @pytest.mark.parametrize("barrier", [side_warps.GRID_PASSED, side_warps.SCALED])
    def test_scales_of_another_norm(self, monkeypatch: pytest.MonkeyPatch, barrier: int) -> None:
        def alter(patch: pytest.MonkeyPatch) -> None:
            real = t.block_barrier
            patch.setattr(t, "block_barrier", lambda n, *which: barrier in which or real(n, *which))

        case = drawn(*self.CASE)
        right = run(monkeypatch, case, SEED, kernel=many_rows)
        try:
            wrong = run(monkeypatch, case, SEED, alter, many_rows)
        except (Race, Deadlock):
            return
        assert not np.array_equal(right[0], wrong[0])
