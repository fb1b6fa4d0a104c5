"""Matrices put together again from the weight stream, on Hopper: for prefill, which multiplies
them whole, in 16 bits.

XLA's own gather and transpose of `Packed.matrix` moves four numbers at a time and takes ten
times as long.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.decode_step.packed.packing import Packed
from pallas_kernels.decode_step.packed.plan import GATE_UP, StepPlan
from pallas_kernels.decode_step.packed.storages import STORAGES
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE, WARPS
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import FORMATS

THREADS = WARPS * t.WARP
"""One for each eight weights of a tile."""
BLOCKS_EACH = 4
"""Blocks a multiprocessor."""
AT_ONCE = 4
"""Tiles a block has on their way."""


def refusal(plan: StepPlan, phase: int, layer: int, dtype: jnp.dtype) -> str | None:
    """Why the kernel can't make numbers of that dtype of a layer's weights, or None."""
    for name in plan.stored(phase, layer):
        if not STORAGES[name].expands_to(dtype.name):
            return f"it makes no {dtype.name} of weights stored as {name}"
    return None


def matrix(
    packed: Packed, plan: StepPlan, phase: int, layer: int, dtype: jnp.dtype
) -> Float[Array, "out in"]:
    """`packed.matrix` by a kernel, rounded to the dtype."""
    this, names = plan.phases[phase], plan.stored(phase, layer)
    begin = plan.begin(packed.tile_offsets, phase, layer)

    def made(name: str, at: Int[Array, " tiles"]) -> Float[Array, "out in"]:
        make = _build(name, len(at), this.across, phase == GATE_UP, plan, dtype.name)
        found: Float[Array, "out in"] = make(packed.stream, at)
        return found

    if len({*names}) == 1:
        return made(names[0], begin)
    segments = [begin[plan.tiles_of(phase, n)] for n in range(len(names))]
    return jnp.concatenate([made(*each) for each in zip(names, segments, strict=True)])


@functools.cache
def _build(
    stored: str, tiles: int, across: int, halves_apart: bool, plan: StepPlan, dtype: str
) -> Callable[..., Any]:
    """Of so many tiles stored so; `halves_apart` where an M-tile holds outputs of both halves."""
    storage, format = STORAGES[stored], FORMATS[dtype]
    outs, columns = tiles // across * M_TILE, across * K_TILE
    spread, blocks = storage.spread, BLOCKS_EACH * plan.blocks

    def move(context: Any, *refs: Any) -> None:
        stream, offsets, matrix = map(t.address, refs)
        warp, lane = t.thread_id() // t.WARP, t.thread_id() % t.WARP
        g, quarter = lane // 4, lane % 4
        own, sixteen = warp * spread // WARPS, warp * spread % WARPS

        def some(i: t.V, _: list[t.V]) -> list[t.V]:
            firsts = [((i * AT_ONCE + n) * blocks + t.cta_id()) * spread for n in range(AT_ONCE)]
            numbers = [first + own for first in firsts]
            there = [number < tiles for number in numbers]
            loaded = []
            for number, inside in zip(numbers, there, strict=True):
                (at,) = t.load_global(offsets + (number << 2).wide(), where=inside)
                tile = stream + at.wide() * plan.granule_bytes
                loaded.append(storage.load(functools.partial(read, tile, inside), warp, lane))
            for number, inside, words in zip(numbers, there, loaded, strict=True):
                weights = storage.expanded(words, format)
                m_tile, tile = number // across, number % across
                height = 8 if halves_apart else M_TILE
                for n, half in itertools.product(range(spread), range(2)):
                    column = (tile * K_TILE + (sixteen + n) * 16 + quarter * 4).wide() * 2
                    out = m_tile * height + half * (outs // 2 if halves_apart else 8) + g
                    target = matrix + out.wide() * (2 * columns) + column
                    pair = weights[4 * n + half : 4 * n + 4 : 2]
                    t.when(inside, functools.partial(t.store_global, target, pair))
            return []

        def read(tile: t.V, inside: t.V, at: t.V, count: int) -> list[t.V]:
            return t.load_global(tile + at.wide(), count, where=inside)

        t.loop(-(-tiles // (blocks * AT_ONCE * spread)), [], some)

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
