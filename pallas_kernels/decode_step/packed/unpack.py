"""Matrices put together again from the weight stream, on Hopper: for prefill, which multiplies
them whole, in 16 bits.

XLA's own gather and transpose of `Packed.matrix` moves four numbers at a time and takes ten
times as long.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.decode_step.packed.packing import Packed
from pallas_kernels.decode_step.packed.plan import GATE_UP, StepPlan
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE, WARPS
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import FORMATS

THREADS = WARPS * t.WARP
"""One for each eight weights of a tile."""
BLOCKS_EACH = 4
"""Blocks a multiprocessor."""
AT_ONCE = 4
"""Tiles a block has on their way."""


def refusal(plan: StepPlan, phase: int, dtype: jnp.dtype) -> str | None:
    """Why the kernel can't make numbers of that dtype of a phase's weights, or None."""
    storage = plan.phases[phase].storage
    if storage.expands_to(dtype.name):
        return None
    return f"it makes no {dtype.name} of weights stored as {storage.name}"


def matrix(
    packed: Packed, plan: StepPlan, phase: int, layer: int, dtype: jnp.dtype
) -> Float[Array, "out in"]:
    """`packed.matrix` by a kernel, rounded to the dtype."""
    return _build(plan, phase, dtype.name)(packed.stream, packed.at(phase, layer))


@functools.cache
def _build(plan: StepPlan, phase: int, dtype: str) -> Callable[..., Any]:
    p, format = plan.phases[phase], FORMATS[dtype]
    outs, columns, across, tiles = p.out, p.columns, p.across, p.m_tiles * p.across
    # Where an M-tile holds outputs of both halves of the matrix.
    halves_apart, blocks = phase == GATE_UP, BLOCKS_EACH * plan.blocks

    def move(context: Any, *refs: Any) -> None:
        stream, offsets, matrix = map(t.address, refs)
        thread = t.thread_id()
        warp, g, quarter = thread // t.WARP, thread % t.WARP // 4, thread % 4

        def some(i: t.V, _: list[t.V]) -> list[t.V]:
            numbers = [(i * AT_ONCE + n) * blocks + t.cta_id() for n in range(AT_ONCE)]
            there = [number < tiles for number in numbers]
            loaded = []
            for number, inside in zip(numbers, there, strict=True):
                (at,) = t.load_global(offsets + (number << 2).wide(), where=inside)
                source = stream + at.wide() * plan.granule_bytes
                loaded.append(p.storage.fetch(source, thread, inside))
            for number, inside, words in zip(numbers, there, loaded, strict=True):
                weights = p.storage.expanded(words, format)
                m_tile, tile = number // across, number % across
                column = (tile * K_TILE + warp * 16 + quarter * 4).wide() * 2
                height = 8 if halves_apart else M_TILE
                for half in range(2):
                    out = m_tile * height + half * (outs // 2 if halves_apart else 8) + g
                    target = matrix + out.wide() * (2 * columns) + column
                    pair = weights[2 * half : 2 * half + 2]
                    t.when(inside, functools.partial(t.store_global, target, pair))
            return []

        t.loop(-(-tiles // (blocks * AT_ONCE)), [], some)

    def body(*refs: Any) -> None:
        t.emit(move, *refs)

    return compat.kernel(
        body,
        name="decode_step_unpack",
        out_type=jax.ShapeDtypeStruct((outs, columns), dtype),
        grid=(blocks,),
        grid_names=("block",),
        warpgroups=THREADS // t.WARPGROUP,
    )
