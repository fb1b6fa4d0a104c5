"""The decode-step kernel of few rows run without a GPU, block by block, on `simt.py`'s machine."""

import numpy as np
import pytest

from pallas_kernels.decode_step.common import phases
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few_rows
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from tests.kernels.emulated_step import (
    GROUPS,
    NARROW,
    ODD,
    SEED,
    SMALL,
    TINY,
    UNEVEN,
    Inputs,
    check,
    check_size,
    drawn,
    run,
    without_barriers,
)
from tests.kernels.simt import Deadlock, Race

pytestmark = pytest.mark.emulated


@pytest.mark.parametrize(
    "inputs",
    [
        (SMALL, 5, [100], 2, "bfloat16"),
        # Shared by several blocks, and so that some warps get no slot.
        (SMALL, 16, [401], 256, "float16"),
        (NARROW, 66, [8448], 67, "bfloat16"),
        (SMALL, 7, [5, 0, 255], 2, "bfloat16"),
        (ODD, 6, [300, 17], 4, "bfloat16"),
        (TINY, 56, [9], 1, "bfloat16"),
        (GROUPS[1], 11, [3, 50, 7, 31, 32], 1, "bfloat16"),
        (GROUPS[7], 11, [3, 40], 1, "bfloat16"),
        (GROUPS[8], 9, [0, 1, 64, 9, 15, 16], 1, "bfloat16"),
        (ODD, 11, [1, 2, 3, 40, 5, 60, 7, 8], 1, "float16"),
        (ODD, 15, [5, 0, 9, 1, 2, 3, 4, 63, 62, 7], 1, "bfloat16"),
        (TINY, 16, [*range(16)], 1, "float16"),
        # The last slot of the last page.
        (SMALL, 7, [383, 256, 127], 3, "bfloat16"),
        (UNEVEN, 7, [40, 3], 1, "bfloat16"),
    ],
)
def test_no_worse_than_xla_and_the_same_in_every_order(
    monkeypatch: pytest.MonkeyPatch, inputs: Inputs
) -> None:
    check(monkeypatch, drawn(*inputs), few_rows)


@pytest.mark.parametrize(("dtype", "cache"), [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_the_cache_has_a_dtype_of_its_own(
    monkeypatch: pytest.MonkeyPatch, dtype: str, cache: str
) -> None:
    check(monkeypatch, drawn(SMALL, 5, [100, 3], 1, dtype, cache=cache), few_rows)


MINIMA = ("q4_k", "q4_1", "q2_k", "q5_1", "q5_k")


@pytest.mark.parametrize("stored", ["float16", MINIMA], ids=["float16", "minima"])
@pytest.mark.parametrize(("size", "rows"), [(5e5, 1), (1e-4, 5)])
def test_float16_takes_hidden_states_of_any_size(
    monkeypatch: pytest.MonkeyPatch, size: float, rows: int, stored: str | tuple[str, ...]
) -> None:
    """It ends at 65504 and has nothing below 6e-8; weights' minima are multiplied with sums."""
    check_size(monkeypatch, size, [20, 3, 1, 0, 7][:rows], few_rows, stored)


class TestWhatIsFound:
    """Mistakes put into the kernel."""

    CASE = (SMALL, 5, [100], 2)

    def test_a_missing_barrier(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(Race):
            run(monkeypatch, drawn(*self.CASE), SEED, without_barriers)

    def test_a_word_that_never_comes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def alter(patch: pytest.MonkeyPatch) -> None:
            real = phases.publish

            def wrong(at: t.V, values: list[t.V], flag: t.V, kept: t.V | None) -> None:
                real(at, values, flag ^ 1, kept)

            patch.setattr(phases, "publish", wrong)

        with pytest.raises(Deadlock):
            run(monkeypatch, drawn(*self.CASE), SEED, alter)

    def test_a_stage_fetched_over_one_that_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = drawn(*self.CASE)
        right = run(monkeypatch, case, SEED)

        def alter(patch: pytest.MonkeyPatch) -> None:
            real = barriers.await_turn

            def hasty(barrier: t.V, parity: t.V) -> None:
                # A stage has two barriers, and the second says that it was read.
                t.when((barrier & 15).equals(0), lambda: real(barrier, parity))

            patch.setattr(barriers, "await_turn", hasty)

        def shows(seed: int) -> bool:
            try:
                wrong = run(monkeypatch, case, seed, alter)
            except Deadlock:  # it was filled twice while a reader waited for once
                return True
            return not np.array_equal(right[0], wrong[0])

        # In one order of five the copies come late enough by chance.
        assert any(shows(SEED + n) for n in range(8))
