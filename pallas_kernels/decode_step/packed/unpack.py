"""Matrices put together again from the weight stream, on Hopper: for prefill, which multiplies
them whole.

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
from pallas_kernels.decode_step.packed.plain import TILE_BYTES
from pallas_kernels.decode_step.packed.plan import GATE_UP, StepPlan
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE
from pallas_kernels.decode_step.ptx import thread as t

THREADS = TILE_BYTES // 16
"""One for each 16 bytes of a tile."""
BLOCKS_EACH = 4
"""Blocks a multiprocessor."""
AT_ONCE = 4
"""Tiles a block has on their way."""


def refusal(plan: StepPlan, phase: int) -> str | None:
    """Why the kernel can't move a phase's weights, or None."""
    storage = plan.phases[phase].storage
    if plan.granule_bytes == storage.tile_bytes == TILE_BYTES:
        return None
    return f"the weights are {storage.name}, not of 16 bits"


def matrix(packed: Packed, plan: StepPlan, phase: int, layer: int = 0) -> Float[Array, "out in"]:
    """`packed.matrix` by a kernel."""
    p = plan.phases[phase]
    build = _build(p.out, p.columns, p.storage.dtype, phase == GATE_UP, plan.blocks)
    return build(packed.stream, packed.at(phase, layer))


@functools.cache
def _build(
    outs: int, columns: int, dtype: jnp.dtype, halves_apart: bool, multiprocessors: int
) -> Callable[..., Any]:
    """The kernel for a matrix; `halves_apart` where an M-tile holds outputs of both its halves."""
    across, tiles = columns // K_TILE, outs // M_TILE * (columns // K_TILE)
    blocks = BLOCKS_EACH * multiprocessors

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
                source = stream + at.wide() * TILE_BYTES + (thread << 4).wide()
                loaded.append(t.load_global(source, 4, where=inside))
            for number, inside, words in zip(numbers, there, loaded, strict=True):
                m_tile, tile = number // across, number % across
                column = (tile * K_TILE + warp * 16 + quarter * 4).wide() * 2
                height = 8 if halves_apart else M_TILE
                for half in range(2):
                    out = m_tile * height + half * (outs // 2 if halves_apart else 8) + g
                    target = matrix + out.wide() * (2 * columns) + column
                    pair = words[2 * half : 2 * half + 2]
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
