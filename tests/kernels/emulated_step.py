"""A decode step on the machine of `simt.py`, block by block, and what it is compared with."""

import dataclasses
import functools
import secrets
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_step import (
    HEAD,
    ModelShape,
    Packed,
    StepPlan,
    empty_stream,
    tile_offsets,
)
from pallas_kernels.decode_step.common import launch
from pallas_kernels.decode_step.common.cache import Pool
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few_rows
from pallas_kernels.decode_step.inside import Inside, read
from pallas_kernels.decode_step.many_rows import mosaic_gpu as many_rows
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.reference import reference
from tests.kernels.float64_step import exact_step
from tests.kernels.simt import Machine, Role
from tests.kernels.simt_thread import install
from tests.kernels.streams import put_numbers, stored_again

SEED = secrets.randbits(31)
SMALL = ModelShape(2, 256, 4, 2, 64, 512, 256, 1e-6)
ODD = ModelShape(3, 256, 2, 1, 128, 384, 256, 1e-6)
"""Three layers, heads of 128, and a feed-forward in parts of different lengths."""
TINY = ModelShape(2, 128, 2, 1, 64, 128, 1024, 1e-6)
"""A layer of it has 48 M-tiles."""
NARROW = ModelShape(1, 128, 2, 1, 64, 128, 256, 1e-6)
TURNS = ModelShape(1, 128, 2, 1, 64, 128, 816, 1e-6)
"""The head has 51 M-tiles."""
PARTS = ModelShape(2, 256, 4, 2, 64, 1152, 256, 1e-6)
UNEVEN = ModelShape(2, 256, 4, 2, 64, 330, 256, 1e-6)
"""A feed-forward of neither whole tiles nor whole M-tiles."""
UNEVEN_BLOCKS = dataclasses.replace(UNEVEN, ffn=352)
"""Whose last tile has three blocks of 32."""
GROUPS = {
    1: ModelShape(1, 256, 2, 2, 128, 256, 256, 1e-6),
    7: ModelShape(1, 256, 14, 2, 64, 256, 256, 1e-6),
    8: ModelShape(1, 512, 8, 1, 64, 256, 256, 1e-6),
}
"""A layer with so many query heads to a key/value head."""


class Case(NamedTuple):
    """One step's inputs, on NumPy: of every operation of JAX's a test would compile one by one."""

    plan: StepPlan
    packed: Packed
    hidden: np.ndarray
    pages: np.ndarray
    tables: np.ndarray
    position: np.ndarray
    inv_freq: np.ndarray
    preceding: np.ndarray | None = None

    @property
    def cached(self) -> np.ndarray:
        """Positions of each row that are in the cache."""
        return self.position if self.preceding is None else self.position - self.preceding


Inputs = tuple[ModelShape, int, list[int], int, str]
"""What `drawn` takes: the model, blocks, positions, pages of a row's block table and the weights'
storage."""


def drawn(
    shape: ModelShape,
    blocks: int,
    positions: list[int],
    table: int,
    stored: "str | tuple[str, ...] | StepPlan" = "bfloat16",
    slots: int = 128,
    shared: int = 0,
    cache: str | None = None,
) -> Case:
    """A case of pages of so many slots, of which all rows that are long enough share the first.

    Args:
        stored: how all matrices are stored, or each phase's, or a plan that says so.
        cache: the cache's dtype, that of the weights where they are numbers of one.
    """
    if isinstance(stored, str):
        stored = (stored,) * (HEAD + 1)
    if isinstance(stored, tuple):
        stored = StepPlan.alike(shape, blocks, *stored)
    plan, packed = stored, _drawn_weights(stored)
    rng = np.random.default_rng([SEED, 1])

    def normal(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims, np.float32)

    rows, h = len(positions), shape.head_dim
    pool, tables = drawn_tables(rng, positions, table, slots, shared)
    return Case(
        plan,
        packed,
        normal(rows, shape.hidden),
        normal(2 * shape.layers, pool, shape.kv_heads, slots, h).astype(cache or plan.head),
        tables,
        np.asarray(positions, np.int32),
        np.float32(1e6) ** (-np.arange(0, h, 2, np.float32) / h),
    )


@functools.cache
def _drawn_weights(plan: StepPlan) -> Packed:
    """Made once for all cases of a plan, since what fills a stream is compiled for each."""
    shape, rng = plan.shape, np.random.default_rng(SEED)

    def normal(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims, np.float32)

    stream = empty_stream(plan)
    for phase, matrix in enumerate(shape.matrices):
        for layer in range(1 if phase == HEAD else shape.layers):
            stream = put_numbers(plan, stream, 0.08 * normal(*matrix), phase, layer)
    norms = 1 + 0.1 * normal(2 * shape.layers + 1, shape.hidden)
    bias = normal(shape.layers, shape.qkv)
    return Packed(np.asarray(stream), bias, norms, tile_offsets(plan))


def drawn_tables(
    rng: np.random.Generator, positions: list[int], table: int, slots: int, shared: int
) -> tuple[int, np.ndarray]:
    """Pages of a pool, some of them nobody's, and block tables with them in any order.

    Entries that a row doesn't need name no page, or one that isn't the row's.
    """
    needed = [-(-position // slots) for position in positions]
    pool = shared + sum(needed) + 3
    order = rng.permutation(pool).astype(np.int32)
    anything = np.asarray([-1, pool, 2**31 - 1, -(2**31), order[-1]], np.int32)
    tables, taken = rng.choice(anything, (len(positions), table)), shared
    for row, count in zip(tables, needed, strict=True):
        row[:count] = order[taken : taken + count]
        common = min(shared, count)
        row[:common] = order[:common]
        taken += count
    return pool, tables


def poisoned(case: Case) -> np.ndarray:
    """The pages with NaN in all slots that no row attends to."""
    count, slots = case.pages.shape[1], case.pages.shape[3]
    read = np.zeros((count, slots), bool)
    for row, position in zip(case.tables, case.cached, strict=True):
        for first in range(0, position, slots):
            read[row[first // slots], : position - first] = True
    return np.where(read[None, :, None, :, None], case.pages, case.pages.dtype.type(np.nan))


@functools.partial(
    jax.jit,
    static_argnums=(1, 2),
    # Else XLA leaves out roundings to 16 bits where a wider number is at hand.
    compiler_options={"xla_allow_excess_precision": False},
)
def _reference(
    packed: Packed, plan: StepPlan, exact: bool, hidden: Any, pages: Any, *rest: Any
) -> Any:
    if exact:
        packed, plan = stored_again(packed, plan, "float32")
        pages = pages.astype(jnp.float32)
    tables, position, inv_freq, preceding = rest
    return reference(packed, plan, hidden, pages, tables, position, inv_freq, 1.0, preceding)


def expected(case: Case, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The reference's logits, keys and values; exact ones if nothing is rounded to 16 bits."""
    inputs = case.hidden, poisoned(case), *case[4:]
    found = _reference(case.packed, case.plan, exact, *inputs)
    return tuple(np.asarray(x, np.float64) for x in found)  # type: ignore


def run(
    patch: pytest.MonkeyPatch,
    case: Case,
    seed: int,
    alter: Callable[[pytest.MonkeyPatch], None] = lambda patch: None,
    kernel: types.ModuleType = few_rows,
) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's logits and new keys and values; slots that no row attends to hold NaN.

    `alter` puts a mistake into the kernel with the patch it is given, which is undone first.
    """
    ((logits, new, _),) = _run(patch, [case], seed, alter, kernel, False)
    return logits, new


def run_on_devices(
    patch: pytest.MonkeyPatch,
    cases: Sequence[Case],
    seed: int,
    alter: Callable[[pytest.MonkeyPatch], None] = lambda patch: None,
    kernel: types.ModuleType = few_rows,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same of each of several devices that have a model together."""
    return [each[:2] for each in _run(patch, cases, seed, alter, kernel, False)]


def run_recorded(
    patch: pytest.MonkeyPatch,
    case: Case,
    seed: int,
    alter: Callable[[pytest.MonkeyPatch], None] = lambda patch: None,
    kernel: types.ModuleType = few_rows,
) -> tuple[np.ndarray, np.ndarray, Inside]:
    """The same of a kernel that records, and what it recorded."""
    ((logits, new, scratch),) = _run(patch, [case], seed, alter, kernel, True)
    return logits, new, read(scratch, case.plan, len(case.position), case.pages.dtype, kernel)


def scratch_of(
    patch: pytest.MonkeyPatch, case: Case, kernel: types.ModuleType
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, keys and values in the cache's dtype, and the scratch of a kernel that records."""
    ((logits, new, scratch),) = _run(patch, [case], SEED, lambda patch: None, kernel, True)
    return logits, new.astype(case.pages.dtype), scratch


def _run(
    patch: pytest.MonkeyPatch,
    cases: Sequence[Case],
    seed: int,
    alter: Callable[[pytest.MonkeyPatch], None],
    kernel: types.ModuleType,
    recorded: bool,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of every device, each with its case, the logits, new keys and values, and the scratch."""
    case, devices = cases[0], len(cases)
    plan, shape, dtype = case.plan, case.plan.shape, case.pages.dtype
    rows = case.hidden.shape[0]
    assert kernel.refusal(plan, rows, dtype) is None
    divided = kernel.memory(plan, rows)
    copied = launch.begins(divided)[2 if kernel is many_rows else 1]
    machine = Machine(plan.blocks, sum(divided), (0, copied), seed, devices=devices)
    refs = [[machine.array(np.asarray(x)) for x in _inputs(each)] for each in cases]
    several, made = case.preceding is not None, []  # type: ignore[var-annotated]
    with patch.context() as inner:
        inner.setattr(launch.compat, "kernel", lambda body, **how: made.append((body, how)))
        pool = Pool.of(case.pages, case.tables)
        kernel.build.__wrapped__(
            plan, rows, pool, dtype, recorded=recorded, several=several, devices=devices
        )
        ((body, how),) = made
        rng = np.random.default_rng(seed)
        for out in how["out_type"]:
            size = int(np.prod(out.shape)) * out.dtype.itemsize
            alike = [machine.array(rng.integers(0, 256, size, np.uint8)) for _ in cases]
            for own, address in zip(refs, alike, strict=True):
                own.append(address)
                machine.alike[address] = alike
        install(inner, machine)
        install_pallas(inner, machine)
        alter(inner)
        workers = [
            (Role(block, first, count), functools.partial(body, *refs[block // plan.blocks], 0))
            for block in range(plan.blocks * devices)
            # Those that compute, a warp that fetches weights, one that fetches inputs, the rest.
            for first, count in ((0, 256), (256, 32), (288, 32), (320, 64))
        ]
        machine.run(workers)
    new_shape = (2 * shape.layers, rows, shape.kv_heads, shape.head_dim)

    def results(own: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logits, new, scratch = (machine.bytes_at(address) for address in own[9:])
        return (
            logits.view(np.float32).reshape(rows, -1),
            new.view(dtype).reshape(new_shape).astype(np.float64),
            scratch.view(np.int32),
        )

    return [results(own) for own in refs]


def _inputs(case: Case) -> list[Any]:
    angles = case.position[:, None].astype(np.float32) * case.inv_freq
    positions = case.position
    if case.preceding is not None:
        positions = np.stack([case.position, case.preceding])
    return [
        case.packed.stream, case.plan.table(), case.packed.bias, case.packed.norms, case.hidden,
        np.stack([np.cos(angles), np.sin(angles)], axis=1), poisoned(case), case.tables, positions,
    ]  # fmt: skip


def install_pallas(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """What the kernel's body asks of Pallas."""

    def signal(_: Any, count: int, *, device_id: int | None = None, **how: Any) -> None:
        there = machine.device if device_id is None else device_id
        machine.semaphores[there] += count * machine.role.count // 128
        machine.progress += 1

    def wait(_: Any, count: int, **how: Any) -> None:
        while machine.semaphores[machine.device] < count:
            machine.give_way()

    def when(condition: bool) -> Callable[[Callable[[], None]], None]:
        return lambda code: code() if condition else None

    patch.setattr(launch, "pl", types.SimpleNamespace(when=when, get_global=lambda kind: None))
    patch.setattr(
        launch,
        "lax",
        types.SimpleNamespace(axis_index=lambda name: machine.role.first // 128),
    )
    patch.setattr(
        launch,
        "plgpu",
        types.SimpleNamespace(
            SemaphoreType=types.SimpleNamespace(REGULAR=None),
            semaphore_signal=signal,
            semaphore_wait=wait,
            set_max_registers=lambda count, action: None,
        ),
    )


def relative(x: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(x - truth) / np.linalg.norm(truth))


def check(
    patch: pytest.MonkeyPatch, case: Case, kernel: types.ModuleType
) -> tuple[np.ndarray, np.ndarray]:
    """Errors of rows beside XLA's in the same dtype; of few blocks, the same bits in two orders.
    Returns what the kernel found.

    A row whose best scores are nearly tied has several times the error of others, in either: so
    the middle rows are compared, and none may be far from all of XLA's. The kernel of few rows
    rounds less than XLA, so that its whole error is smaller in spite of those.
    """
    truth, xla = exact_step(case), expected(case)
    orders = 2 if case.plan.blocks <= 10 else 1
    found = [run(patch, case, SEED + n, kernel=kernel) for n in range(orders)]
    for mine, theirs, right, rows in zip(found[0], xla, truth, (0, 1), strict=True):
        ours, xlas = (
            [relative(*row) for row in zip(*(np.moveaxis(x, rows, 0) for x in both), strict=True)]
            for both in ((mine, right), (theirs, right))
        )
        print(f"seed {SEED}: kernel {np.median(ours):.2e}, xla {np.median(xlas):.2e}")
        assert np.median(ours) <= 1.5 * np.median(xlas)
        assert max(ours) <= 10 * max(xlas)
        if kernel is few_rows:
            assert relative(mine, right) <= 1.5 * relative(theirs, right)
    for again in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], again, strict=True))
    return found[0]


def check_size(
    patch: pytest.MonkeyPatch,
    size: float,
    positions: list[int],
    kernel: types.ModuleType,
    stored: str | tuple[str, ...] = "float16",
) -> None:
    """The error of products in float16 beside XLA's of weights in float16, with positive embeddings
    of that size, so that sums of them are large too."""
    case = drawn(SMALL, 11, positions, 1, stored, cache="float16")
    case = case._replace(hidden=np.abs(case.hidden) * np.float32(size))
    check_beside(patch, case, kernel, "float16")


def check_beside(
    patch: pytest.MonkeyPatch, case: Case, kernel: types.ModuleType, stored: str
) -> None:
    """The error beside XLA's of the same weights as numbers of that dtype."""
    packed, plan = stored_again(case.packed, case.plan, stored)
    truth, xla = exact_step(case), expected(case._replace(packed=packed, plan=plan))
    found = run(patch, case, SEED, kernel=kernel)
    for mine, theirs, right in zip(found, xla, truth, strict=True):
        error, of_xla = relative(mine, right), relative(theirs, right)
        print(f"seed {SEED}: kernel {error:.2e}, xla {of_xla:.2e}")
        assert error <= 1.5 * of_xla


def without_barriers(patch: pytest.MonkeyPatch) -> None:
    """A mistake: the threads that compute don't wait for each other."""
    real = t.block_barrier
    patch.setattr(t, "block_barrier", lambda n, *which: real(n, *which) if n != 256 else None)
