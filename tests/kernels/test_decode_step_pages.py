"""The decode step's paged cache: where pages lie, who shares them, and what tables hold besides."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_step import decode_step
from pallas_kernels.decode_step.common.cache import PagedCache
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few_rows
from pallas_kernels.decode_step.many_rows import mosaic_gpu as many_rows
from pallas_kernels.decode_step.ptx.thread import V
from tests.kernels.emulated_step import (
    NARROW,
    ODD,
    SEED,
    SMALL,
    Case,
    check,
    drawn,
    expected,
    run,
)

pytestmark = pytest.mark.emulated

every_kernel = pytest.mark.parametrize("kernel", [few_rows, many_rows], ids=["few", "many"])


def moved(case: Case) -> Case:
    """The same rows, each with pages of its own, side by side in a pool of another size."""
    slots, width = case.pages.shape[3], case.tables.shape[1]
    tables = np.arange(case.tables.size, dtype=np.int32).reshape(case.tables.shape)
    pages = np.zeros((len(case.pages), tables.size, *case.pages.shape[2:]), case.pages.dtype)
    for row, position in enumerate(case.position):
        for n in range(-(-position // slots)):
            pages[:, row * width + n] = case.pages[:, case.tables[row, n]]
    return case._replace(pages=pages, tables=tables)


@every_kernel
@pytest.mark.parametrize("slots", [128, 256])
def test_rows_share_their_first_pages(
    monkeypatch: pytest.MonkeyPatch, kernel: types.ModuleType, slots: int
) -> None:
    positions = [600, 2 * slots + 9, 0, 3, 2 * slots, slots - 1]
    case = drawn(ODD, 7, positions, 5, slots=slots, shared=2)
    assert len(set(case.tables[[0, 1, 4], 1])) == 1
    check(monkeypatch, case, kernel)


@every_kernel
def test_rows_of_one_table(monkeypatch: pytest.MonkeyPatch, kernel: types.ModuleType) -> None:
    case = drawn(SMALL, 9, [254, 255, 256, 257], 3)
    check(monkeypatch, case._replace(tables=case.tables[[3, 3, 3, 3]]), kernel)


@every_kernel
@pytest.mark.parametrize(("blocks", "positions"), [(5, [300, 129, 40]), (22, [1500])])
def test_it_does_not_matter_where_pages_lie(
    monkeypatch: pytest.MonkeyPatch,
    kernel: types.ModuleType,
    blocks: int,
    positions: list[int],
) -> None:
    case = drawn(NARROW, blocks, positions, 12, shared=1)
    ours, theirs = (run(monkeypatch, c, SEED, kernel=kernel) for c in (case, moved(case)))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    ours, theirs = (expected(c) for c in (case, moved(case)))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@every_kernel
def test_another_page_is_found(monkeypatch: pytest.MonkeyPatch, kernel: types.ModuleType) -> None:
    """A mistake put into the kernel: it takes the next page."""
    case, real = drawn(SMALL, 5, [300], 4), PagedCache.page

    def alter(patch: pytest.MonkeyPatch) -> None:
        def page(cache: PagedCache, row: V, slot: V) -> V:
            return real(cache, row, slot + cache.pool.slots)

        patch.setattr(PagedCache, "page", page)

    right = run(monkeypatch, case, SEED, kernel=kernel)
    try:
        wrong = run(monkeypatch, case, SEED, alter, kernel)
    except (IndexError, AssertionError):  # no page of the pool
        return
    assert not np.array_equal(right[0], wrong[0])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pages": jnp.zeros((4, 3, 2, 64, 64), jnp.bfloat16)}, "3 pages of 64 slots"),
        ({"pages": jnp.zeros((4, 3, 2, 384, 64), jnp.bfloat16)}, "3 pages of 384 slots"),
        ({"pages": jnp.zeros((4, 0, 2, 128, 64), jnp.bfloat16)}, "0 pages of 128 slots"),
        ({"pages": jnp.zeros((2, 3, 2, 128, 64), jnp.bfloat16)}, "don't fit"),
        ({"tables": jnp.zeros((2, 3), jnp.int32)}, "int32 (2, 3), not int32 of 1 rows"),
        ({"tables": jnp.zeros((1, 0), jnp.int32)}, "int32 (1, 0), not"),
        ({"tables": jnp.zeros((1, 3), jnp.uint32)}, "uint32 (1, 3), not"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, jnp.ndarray], why: str) -> None:
    inputs = drawn(SMALL, 5, [3], 1)._asdict() | changes
    with pytest.raises(ValueError) as refused:
        decode_step(**inputs, implementation="xla")
    assert why in str(refused.value)
