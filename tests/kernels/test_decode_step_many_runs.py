"""The kernel of many rows run without a GPU, as that of few rows is in `test_decode_step_runs`."""

import numpy as np
import pytest

from pallas_kernels.decode_step.many_rows import mosaic_gpu as many
from pallas_kernels.decode_step.many_rows import warps
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from tests.kernels.emulated_step import (
    GROUPS,
    ODD,
    PARTS,
    SEED,
    SMALL,
    TURNS,
    Inputs,
    check,
    check_size,
    drawn,
    expected,
    relative,
    run,
    without_barriers,
)
from tests.kernels.simt import Deadlock, Race


@pytest.mark.parametrize(
    "inputs",
    [
        (SMALL, 9, [*range(17)], 1, "bfloat16"),
        (SMALL, 5, [255, *range(24)], 2, "float16"),
        # A text is shared by several blocks, and several bands by a warp.
        (ODD, 20, [300, 17, 200, 3, 129], 256, "bfloat16"),
        # So many bands that they are multiplied in turns, 13 and 12.
        (TURNS, 2, [7] * 20, 1, "float16"),
        # The parts of the down projection are two tiles and one; more blocks than heads.
        (PARTS, 15, [3, 9, 20, 31, 63], 1, "bfloat16"),
        # The only one that finds an input's slot filled before it was read.
        (GROUPS[8], 11, [*range(64)], 1, "bfloat16"),
    ],
)
def test_many_rows(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    check(monkeypatch, drawn(*inputs), many)


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_float16_takes_hidden_states_of_any_size(
    monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    """Embeddings, which are not scaled, end at 65504."""
    check_size(monkeypatch, size, [20, 3, 1, 0, 7], many)


def test_float16_takes_hidden_states_that_grow_a_millionfold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer's down projection makes numbers of which 16 bits have none so large."""
    case = drawn(SMALL, 5, [3, 20, 7], 1, "float16")
    down = case.packed.at(3, 0)
    tape = case.packed.tape.copy()
    tape[down] = np.clip(tape[down].astype(np.float32) * 2e5, -6e4, 6e4)
    case = case._replace(packed=case.packed._replace(tape=tape))
    truth, xla = expected(case, "float32"), expected(case, "float16")
    found = run(monkeypatch, case, SEED, kernel=many)
    assert relative(found[0], truth[0]) <= 2 * relative(xla[0], truth[0])


class TestWhatIsFound:
    """Mistakes put into the kernel."""

    CASE = (SMALL, 5, [100], 2)

    def test_a_missing_barrier(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(Race):
            run(monkeypatch, drawn(*self.CASE), SEED, without_barriers, many)

    def test_a_block_that_does_not_wait_for_the_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def alter(patch: pytest.MonkeyPatch) -> None:
            patch.setattr(barriers, "await_count", lambda counter, count: None)

        case = drawn(*self.CASE)
        right = run(monkeypatch, case, SEED, kernel=many)
        wrong = run(monkeypatch, case, SEED, alter, many)
        assert not np.array_equal(right[0], wrong[0])

    @pytest.mark.parametrize("barrier", [warps.MET, warps.SCALED])
    def test_scales_of_another_norm(self, monkeypatch: pytest.MonkeyPatch, barrier: int) -> None:
        def alter(patch: pytest.MonkeyPatch) -> None:
            real = t.together
            patch.setattr(t, "together", lambda n, *which: barrier in which or real(n, *which))

        case = drawn(*self.CASE)
        right = run(monkeypatch, case, SEED, kernel=many)
        try:
            wrong = run(monkeypatch, case, SEED, alter, many)
        except (Race, Deadlock):
            return
        assert not np.array_equal(right[0], wrong[0])
