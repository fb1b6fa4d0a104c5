"""Numbers that say which turn they belong to, so that blocks wait for data, not for each other.

The last bit of a tagged float32 is the parity of its turn: a reader loads until every word has
it. Each word stands for itself, so no fence and no barrier across the grid is needed, and what
arrives first is already there when the last does. The bit costs 2^-23 of the value. This is
the idea of NCCL's low-latency protocol, with the flag inside the word.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from pallas_kernels.decode_step.plan import ROWS, Phase
from pallas_kernels.decode_step.vectors import strided

EMPTY = -0x5A5A5B
"""The word of a slot that nobody fills: a NaN that no arithmetic gives. Read as zero at once."""

WARPGROUP = 128


def tagged(value: jax.Array, tag: jax.Array) -> jax.Array:
    """`value`, float32, with its last bit replaced by `tag`, 0 or 1."""
    word = lax.bitcast_convert_type(value, jnp.int32)
    return lax.bitcast_convert_type((word & -2) | tag, jnp.float32)


def totals(sums: Any, p: Phase, runs: Sequence[tuple[Any, int]], tag: jax.Array) -> list[jax.Array]:
    """Runs of a phase's product, (first row, length) each: its slots added up in order."""
    places = [(slot * p.rows + at, width) for at, width in runs for slot in range(p.slots)]
    parts = iter(_awaited(sums, places, tag))
    return [sum((next(parts) for _ in range(1, p.slots)), start=next(parts)) for _ in runs]


def empty_slots(p: Phase, at: Any) -> jax.Array:
    """What 128 numbers of a product's slots hold before the first turn, whose tag is 1."""
    index = at + plgpu.broadcasted_iota(jnp.int32, (WARPGROUP,), 0, layout=strided(WARPGROUP))
    slot, row = lax.div(index, p.rows), lax.div(lax.rem(index, p.rows), ROWS)
    word = jnp.where((slot < p.slots) & p.fills(slot, row), 0, jnp.int32(EMPTY))
    return lax.bitcast_convert_type(word, jnp.float32)


def _awaited(sums: Any, places: Sequence[tuple[Any, int]], tag: jax.Array) -> list[jax.Array]:
    """Runs of a buffer, (first, length) each, once all their words carry `tag`."""
    refs = [sums.at[pl.ds(at, width)] for at, width in places]
    widths = [width for _, width in places]

    @plgpu.inline_mgpu(
        arg_types=(*(plgpu.RefType() for _ in refs), plgpu.Layout.WG_SPLAT),
        return_type=[
            plgpu.ShapeDtypeStruct((width,), jnp.float32, layout=strided(width)) for width in widths
        ],
    )
    def poll(_: Any, *operands: Any) -> list[Any]:
        *memory, parity = operands
        return _poll(memory, widths, parity.registers.item())

    return poll(*refs, tag)


def _poll(memory: Sequence[Any], widths: Sequence[int], parity: Any) -> list[Any]:
    """Loads every word until all of this thread's carry the parity; then zeroes empty slots."""
    i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
    f32 = ir.F32Type.get()
    thread = arith.extui(i64, utils.thread_idx())
    pointers = []
    for ref, width in zip(memory, widths, strict=True):
        own = utils.getelementptr(utils.memref_ptr(ref), [thread], f32)
        pointers += [
            llvm.ptrtoint(i64, utils.getelementptr(own, [i * WARPGROUP], f32))
            for i in range(width // WARPGROUP)
        ]
    loop = scf.WhileOp([i32] * len(pointers), [])
    with ir.InsertionPoint.at_block_begin(loop.before.blocks.append()):
        words: list[Any] = [
            llvm.inline_asm(
                i32, [p], "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", has_side_effects=True
            )
            for p in pointers
        ]
        missing: Any = None
        for word in words:
            bit = arith.andi(arith.xori(word, parity), utils.c(1, i32))
            late = arith.cmpi(arith.CmpIPredicate.ne, bit, utils.c(0, i32))
            filled = arith.cmpi(arith.CmpIPredicate.ne, word, utils.c(EMPTY, i32))
            late = arith.andi(late, filled)
            missing = late if missing is None else arith.ori(missing, late)
        scf.condition(missing, words)
    body = loop.after.blocks.append(*[i32] * len(pointers))
    with ir.InsertionPoint.at_block_begin(body):
        scf.yield_([])
    values: list[Any] = []
    for word in loop.results:
        empty = arith.cmpi(arith.CmpIPredicate.eq, word, utils.c(EMPTY, i32))
        value = arith.bitcast(f32, arith.select(empty, utils.c(0, i32), word))
        values.append(vector.broadcast(ir.VectorType.get((1,), f32), value))
    ends = np.cumsum([width // WARPGROUP for width in widths])[:-1]
    return [
        mgpu.FragmentedArray(
            _registers=registers,
            _layout=mgpu.WGStridedFragLayout((width,), vec_size=1),
            _is_signed=None,
        )
        for width, registers in zip(widths, np.split(np.array(values, object), ends), strict=True)
    ]
