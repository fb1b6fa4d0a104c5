"""How both kernels are launched: a block a multiprocessor, which stays for the whole step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels import compat
from pallas_kernels.decode_step.common.trace import PHASES, Trace
from pallas_kernels.decode_step.packed.plan import StepPlan
from pallas_kernels.decode_step.packed.storages import STORAGES
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE, WARPS
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import FORMATS
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.lazy import lazy
from pallas_kernels.target import HOPPER

pl = lazy("jax.experimental.pallas")
plgpu = lazy("jax.experimental.pallas.mosaic_gpu")

SHARED_BYTES = HOPPER.shared_bytes - HOPPER.reserved_bytes
"""Shared memory that a block divides."""

THREADS = WARPS * t.WARP
"""Of a block, that compute."""
FETCHERS = t.WARPGROUP
"""Threads beside those that compute: to fetch and the like, but they come by the warpgroup."""

FETCHER_REGISTERS = 40
REGISTERS = HOPPER.registers_beside(THREADS, FETCHERS, FETCHER_REGISTERS)
"""Of a thread that computes."""

HEAD_DIMS = (64, 128)

LOGITS, EXCHANGE = 8, 10
"""Which of a kernel's references but the weight stream these are."""


class Roles(NamedTuple):
    """What a block's threads do, each a function of a context and of references.

    Attributes:
        make: sets up barriers; all threads, with the shared memory.
        beside: the threads that don't compute, with the weight stream, the table, the exchange and
            the shared memory.
        start: those that do, before the first grid barrier; with all references but the stream.
        steps: the same, after.
    """

    make: Callable[..., None]
    beside: Callable[..., None]
    start: Callable[..., None]
    steps: Callable[..., None]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Addresses of a kernel's arguments and results but the weight stream, in their order.

    Attributes:
        times: of a traced kernel, int32 `[blocks, phases]`.
    """

    table: V
    bias: V
    norms: V
    hidden: V
    rope: V
    pages: V
    tables: V
    positions: V
    logits: V
    new: V
    exchange: V
    times: V | None = None

    @classmethod
    def of(cls, refs: Sequence[Any]) -> "Arguments":
        return cls(*map(t.address, refs))

    def trace(self, cta: V) -> Trace:
        """That block's, where there is one."""
        if self.times is None:
            return Trace(None)
        return Trace(self.times + (cta * (4 * len(PHASES))).wide())


def begins(sizes: Sequence[int]) -> list[int]:
    """Where regions of shared memory begin that lie one after the other, of so many bytes each."""
    return [sum(sizes[:i]) for i in range(len(sizes))]


def unfit(plan: StepPlan, cache: DTypeLike) -> str | None:
    """Why neither kernel can run the model with a cache of that dtype, or None."""
    shape = plan.shape
    for storage in plan.storages:
        if storage.format is None:
            known = [name for name, each in STORAGES.items() if each.format]
            return f"the weights are {storage.name}, not one of {', '.join(known)}"
    if jnp.dtype(cache).name not in FORMATS:
        return f"the cache is {jnp.dtype(cache).name}, not {' or '.join(FORMATS)}"
    for out, columns in shape.packed_matrices:
        if out % M_TILE or columns % K_TILE:
            return f"a matrix of {out} x {columns} is not made of {M_TILE} x {K_TILE} tiles"
    for phase, (_, columns) in zip(plan.phases, shape.matrices, strict=True):
        if len({storage.format for storage in phase.storages}) > 1:
            names = " and ".join(storage.name for storage in phase.storages)
            return f"products with {names} are taken in different formats, of one input"
        for storage in phase.storages:
            if columns % storage.block:
                return f"rows of {columns} numbers are not whole blocks of {storage.name}"
    if shape.head_dim not in HEAD_DIMS:
        return f"the head dimension is {shape.head_dim}, neither 64 nor 128"
    if shape.group > 8:
        return f"{shape.group} query heads share a key/value head, more than 8"
    return None


def by_role(beside: Callable[[], None], compute: Callable[[], None]) -> None:
    """In a kernel's body: what threads do that don't compute, and what those do that do."""
    warpgroup = lax.axis_index("wg")

    @pl.when(warpgroup == THREADS // t.WARPGROUP)
    def _() -> None:
        plgpu.set_max_registers(FETCHER_REGISTERS, action="decrease")
        beside()

    @pl.when(warpgroup < THREADS // t.WARPGROUP)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS, action="increase")
        compute()


def persistent(
    name: str,
    plan: StepPlan,
    rows: int,
    cache: DTypeLike,
    words: int,
    shared: int,
    roles: Roles,
    traced: bool,
    devices: int,
) -> Callable[..., Any]:
    """A kernel as `kernels.build` describes it, whose exchange has so many words, and whose blocks
    have so many bytes of shared memory.
    """
    shape, blocks = plan.shape, plan.blocks
    count = blocks * THREADS // t.WARPGROUP

    def meet(semaphore: Any, turn: int) -> None:
        """Blocks of all devices wait for each other, for the `turn`-th time."""
        if devices == 1:
            plgpu.semaphore_signal(semaphore, 1, memory_scope="gpu")
            plgpu.semaphore_wait(semaphore, count, memory_scope="gpu", decrement=False)
            return
        for device in range(devices):
            plgpu.semaphore_signal(semaphore, 1, device_id=device)
        plgpu.semaphore_wait(semaphore, turn * devices * count, decrement=False)

    def body(*refs: Any) -> None:
        stream, table, memory, smem = (refs[i] for i in (0, 1, 11, -1))
        semaphore = pl.get_global(plgpu.SemaphoreType.REGULAR)
        t.emit(roles.make, smem)

        def compute() -> None:
            t.emit(roles.start, *refs[1:])
            meet(semaphore, 1)
            t.emit(roles.steps, *refs[1:])
            if devices > 1:
                # The others' logits are there.
                meet(semaphore, 2)

        by_role(lambda: t.emit(roles.beside, stream, table, memory, smem), compute)

    return compat.kernel(
        body,
        name=name,
        out_type=(
            jax.ShapeDtypeStruct((rows, devices * shape.vocab), jnp.float32),
            jax.ShapeDtypeStruct((2 * shape.layers, rows, shape.kv_heads, shape.head_dim), cache),
            jax.ShapeDtypeStruct((words,), jnp.int32),
            *[jax.ShapeDtypeStruct((blocks, len(PHASES)), jnp.int32)] * traced,
        ),
        grid=(blocks,),
        grid_names=("sm",),
        scratch_types=(plgpu.SMEM((shared // 4,), jnp.int32),),
        warpgroups=(THREADS + FETCHERS) // t.WARPGROUP,
    )
