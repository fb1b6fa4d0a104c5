"""Rows that are positions of one text, in one step: as if those before were in the cache."""

import types

import numpy as np
import pytest

from pallas_kernels.decode_step.common.heads import Heads, New
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few_rows
from pallas_kernels.decode_step.many_rows import mosaic_gpu as many_rows
from pallas_kernels.decode_step.ptx.thread import V
from tests.kernels.emulated_step import (
    GROUPS,
    NARROW,
    ODD,
    SEED,
    SMALL,
    Case,
    Inputs,
    check,
    drawn,
    run,
)

pytestmark = pytest.mark.emulated

every_kernel = pytest.mark.parametrize("kernel", [few_rows, many_rows], ids=["few", "many"])


def followed(inputs: Inputs, preceding: list[int]) -> Case:
    """A case in which so many rows before each row are its text's."""
    case, counts = drawn(*inputs), np.asarray(preceding, np.int32)
    rows = np.arange(len(counts))
    last = np.asarray([max(r for r in rows if r - counts[r] == first) for first in rows - counts])
    return case._replace(tables=case.tables[last], preceding=counts)


def in_cache(case: Case, new: np.ndarray) -> Case:
    """The same rows where each finds those before it in its own pages, which hold nothing else of
    theirs: of each row a copy of all its pages."""
    slots, width = case.pages.shape[3], case.tables.shape[1]
    tables = np.arange(case.tables.size, dtype=np.int32).reshape(case.tables.shape)
    pages = np.zeros((len(case.pages), tables.size, *case.pages.shape[2:]), case.pages.dtype)
    assert case.preceding is not None
    for row, position in enumerate(case.position):
        for n in range(-(-int(case.cached[row]) // slots)):
            pages[:, row * width + n] = case.pages[:, case.tables[row, n]]
        for back in range(1, case.preceding[row] + 1):
            page, slot = divmod(int(position) - back, slots)
            pages[:, row * width + page, :, slot] = new[:, row - back]
    return case._replace(pages=pages, tables=tables, preceding=None)


CASES = [
    ((SMALL, 7, [100, 101, 102], 2, "bfloat16"), [0, 1, 2]),
    # Beside others; over the end of a page, and in the first one of a text.
    ((SMALL, 15, [126, 127, 128, 129, 3, 0, 1], 2, "float16"), [0, 1, 2, 3, 0, 0, 1]),
    ((ODD, 11, [9, 300, 301, 302, 40, 41], 4, "bfloat16"), [0, 0, 1, 2, 0, 1]),
    # Several blocks share a context; the last one's slots are all new.
    ((SMALL, 16, [508, 509, 510, 511, 512, 513, 514, 515], 256, "bfloat16"), [*range(8)]),
    ((NARROW, 24, [896, 897, 898], 8, "bfloat16"), [0, 1, 2]),
    ((GROUPS[7], 11, [3, 4, 5], 1, "bfloat16"), [0, 1, 2]),
    ((GROUPS[8], 9, [15, 16, 64], 1, "bfloat16"), [0, 1, 0]),
]  # fmt: skip


@every_kernel
@pytest.mark.parametrize(("inputs", "preceding"), CASES)
def test_the_bits_are_those_of_a_cache_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
    kernel: types.ModuleType,
    inputs: Inputs,
    preceding: list[int],
) -> None:
    case = followed(inputs, preceding)
    logits, new = run(monkeypatch, case, SEED, kernel=kernel)
    right = run(monkeypatch, in_cache(case, new), SEED, kernel=kernel)
    np.testing.assert_array_equal(logits, right[0])
    np.testing.assert_array_equal(new, right[1])


@every_kernel
@pytest.mark.parametrize(("inputs", "preceding"), [CASES[1], CASES[3]])
def test_no_worse_than_xla(
    monkeypatch: pytest.MonkeyPatch,
    kernel: types.ModuleType,
    inputs: Inputs,
    preceding: list[int],
) -> None:
    check(monkeypatch, followed(inputs, preceding), kernel)


@every_kernel
def test_rows_none_of_which_follows_have_the_bits_of_the_plain_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: types.ModuleType
) -> None:
    case = drawn(SMALL, 7, [5, 0, 255], 2)
    plain = run(monkeypatch, case, SEED, kernel=kernel)
    several = case._replace(preceding=np.zeros(3, np.int32))
    for ours, theirs in zip(run(monkeypatch, several, SEED, kernel=kernel), plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@every_kernel
@pytest.mark.parametrize("mistake", ["pages alone", "a row too far", "not stored"])
def test_mistakes_are_seen(
    monkeypatch: pytest.MonkeyPatch, kernel: types.ModuleType, mistake: str
) -> None:
    case = followed((SMALL, 7, [100, 101, 102], 2, "bfloat16"), [0, 1, 2])
    real = New.instead

    def alter(patch: pytest.MonkeyPatch) -> None:
        if mistake == "pages alone":
            patch.setattr(New, "instead", lambda self, at, *_: at)
        elif mistake == "a row too far":

            def further(self: New, at: V, slot: V, which: int, column: V) -> V:
                return real(self, at, slot - 1, which, column)

            patch.setattr(New, "instead", further)
        else:
            patch.setattr(Heads, "_write", lambda *_: None)

    right = run(monkeypatch, case, SEED, kernel=kernel)
    wrong = run(monkeypatch, case, SEED, alter, kernel)
    assert not np.array_equal(right[0], wrong[0])
