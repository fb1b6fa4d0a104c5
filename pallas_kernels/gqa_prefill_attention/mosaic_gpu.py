"""Causal flash attention of a chunk of a prompt on Hopper.

A tile is 64 rows of queries, one warpgroup's share of a tensor core product: 64 positions of
one head, or all positions of several heads where the chunk is shorter. The consumer
warpgroups of a block of threads take tiles of one kv head and share the key and value blocks
that a producer warpgroup streams into a ring in shared memory. A block of slots lies in one
page, whose number the producer reads from the row's block table.

Each consumer keeps two products in flight (Shah et al., 2024, arXiv:2407.08608): while the
tensor cores weigh the values of block i, it takes the softmax of block i + 1.

Where there are fewer tiles than processors, the slots are split between blocks of threads,
and a second pass puts the parts together by the logarithms of their sums.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.gqa_prefill_attention.tiling import ROWS, Shape, Tiling, best_tiling
from pallas_kernels.target import HOPPER

NOTHING = -1e30
"""The running maximum before the first slot. Finite, for -inf - -inf is NaN."""

DTYPES = ("bfloat16", "float16")
DIMS = (64, 128)
SHORT = (16, 32)
"""Chunks shorter than a tile: several heads share it."""

PAGE = 128
"""Slots of a page divide by this, and so by a block."""

WARPGROUP = 128
PRODUCER_REGISTERS = {2: 24, 3: 32}
"""Of a thread of the producing warpgroup, by the number of consumers."""


def refusal(q: tuple[int, ...], pages: tuple[int, ...], *dtypes: jnp.dtype) -> str | None:
    """Why the kernel can't serve q [B, T, N, H] and pages [P, K, C, H], or None if it can."""
    steps, dim, page = q[1], q[3], pages[2]
    names = {dtype.name for dtype in dtypes}
    if len(names) > 1:
        return f"its kernel takes one dtype for q and pages, not {' and '.join(sorted(names))}"
    if not names <= set(DTYPES):
        return f"its kernel takes {' or '.join(DTYPES)}, not {names.pop()}"
    if dim not in DIMS:
        return f"its kernel takes heads of {' or '.join(map(str, DIMS))}, not {dim}"
    if steps % ROWS and steps not in SHORT:
        return f"its kernel takes {SHORT} or a multiple of {ROWS} positions, not {steps}"
    if page % PAGE:
        return f"its kernel takes pages of a multiple of {PAGE} slots, not {page}"
    return None


# Jitted so that the layers of a model share one lowering of it.
@functools.partial(jax.jit, static_argnames="tiling")
def gqa_prefill_attention(
    q: Float[Array, "B T N H"],
    pages: Float[Array, "P K C H"],
    k_tables: Int[Array, "B n"],
    v_tables: Int[Array, "B n"],
    offsets: Int[Array, "B"],
    lengths: Int[Array, "B"],
    tiling: Tiling | None = None,
) -> Float[Array, "B T N H"]:
    """The kernel, for what `refusal` lets pass; arguments as in the public function."""
    rows, steps, heads, dim = q.shape
    kv_heads, page = pages.shape[1:3]
    shape = Shape(rows, steps, heads, kv_heads, k_tables.shape[1] * page, dim)
    tiling = tiling or best_tiling(shape)
    blocks = pl.cdiv(shape.tiles, tiling.consumers)
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    ring = plgpu.SMEM((tiling.stages, tiling.block, dim), q.dtype, transforms=tiled)
    full = plgpu.Barrier(num_barriers=tiling.stages)
    free = plgpu.Barrier(num_barriers=tiling.stages, num_arrivals=tiling.consumers)
    out: tuple[jax.ShapeDtypeStruct, ...] = (jax.ShapeDtypeStruct(q.shape, q.dtype),)
    if tiling.splits > 1:
        tile_rows = (tiling.splits, rows, kv_heads, shape.tiles, ROWS)
        out = tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in ((*tile_rows, dim), tile_rows))
    result = compat.kernel(
        functools.partial(_body, shape=shape, tiling=tiling),
        name="gqa_prefill_attention",
        out_type=out,
        grid=(tiling.splits, blocks, rows * kv_heads),
        grid_names=("split", "block", "row_head"),
        scratch_types={
            "q_tiles": plgpu.SMEM((tiling.consumers, ROWS, dim), q.dtype, transforms=tiled),
            "k_ring": ring,
            "v_ring": ring,
            "q_full": plgpu.Barrier(num_barriers=tiling.consumers, num_arrivals=shape.tile_heads),
            "k_full": full,
            "v_full": full,
            "k_free": free,
            "v_free": free,
        },
        warpgroups=tiling.consumers + 1,
        approx_math=True,
    )(q, pages, *(x.astype(jnp.int32) for x in (k_tables, v_tables, offsets, lengths)))
    if tiling.splits == 1:
        return result[0]
    parts, sums = result
    return _combine(parts, sums, shape).astype(q.dtype)


def _body(
    q: Any,
    pages: Any,
    k_tables: Any,
    v_tables: Any,
    offsets: Any,
    lengths: Any,
    out: Any,
    *sums: Any,
    q_tiles: Any,
    k_ring: Any,
    v_ring: Any,
    q_full: Any,
    k_full: Any,
    v_full: Any,
    k_free: Any,
    v_free: Any,
    shape: Shape,
    tiling: Tiling,
) -> None:
    block, stages, consumers = tiling.block, tiling.stages, tiling.consumers
    page = pages.shape[2]
    split, row_head = lax.axis_index("split"), lax.axis_index("row_head")
    warpgroup = lax.axis_index("wg")
    row, kv_head = lax.div(row_head, shape.kv_heads), lax.rem(row_head, shape.kv_heads)
    # The last positions see the most slots: they start first.
    blocks = pl.cdiv(shape.tiles, consumers)
    first_tile = (blocks - 1 - lax.axis_index("block")) * consumers
    last_tile = jnp.minimum(first_tile + consumers, shape.tiles) - 1

    def position(tile: Any) -> Any:
        return lax.div(tile, shape.head_tiles) * shape.queries

    offset, length = offsets[row], jnp.minimum(lengths[row], shape.capacity)
    seen = jnp.minimum(length, offset + position(last_tile) + shape.queries)
    # Queries past the row's length mean nothing: one block is enough for them.
    seen = jnp.where(offset + position(first_tile) < length, seen, 1)
    steps = jnp.maximum(lax.div(seen + block - 1, block), 1)
    share = lax.div(steps + tiling.splits - 1, tiling.splits)
    begin = split * share
    # A split with nothing to do takes the last block and sees no slot of it.
    length = jnp.where(begin < steps, length, 0)
    begin = jnp.minimum(begin, steps - 1)
    end = jnp.minimum(begin + share, steps)

    kept = PRODUCER_REGISTERS[consumers]
    registers = HOPPER.registers_beside(consumers * WARPGROUP, WARPGROUP, kept)

    @pl.when(warpgroup == consumers)
    def _produce() -> None:
        plgpu.set_max_registers(kept, action="decrease")

        @pl.loop(begin, end)
        def _block(step: Any) -> None:
            count = step - begin
            slot = lax.rem(count, stages)
            entry, start = lax.div(step * block, page), lax.rem(step * block, page)
            # Both read before the waits, so that the loads' latency passes within them.
            numbers = k_tables[row, entry], v_tables[row, entry]
            for number, ring, full, free in (
                (numbers[0], k_ring, k_full, k_free),
                (numbers[1], v_ring, v_full, v_free),
            ):

                @pl.when(count >= stages)
                def _reused(free: Any = free) -> None:
                    plgpu.barrier_wait(free.at[slot])

                source = pages.at[number, kv_head, pl.ds(start, block)]
                plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])

    @pl.when(warpgroup < consumers)
    def _consume() -> None:
        plgpu.set_max_registers(registers, action="increase")
        # A tile past the last one repeats it.
        tile = jnp.minimum(first_tile + warpgroup, last_tile)
        start = position(tile)
        first_head = lax.rem(tile, shape.head_tiles) * shape.tile_heads
        q_tile = q_tiles.at[warpgroup]

        def parts() -> Any:
            """Where the heads of the tile lie in shared and in global memory."""
            for i in range(shape.tile_heads):
                head = kv_head * shape.group + jnp.minimum(first_head + i, shape.group - 1)
                yield (
                    q_tile.at[pl.ds(i * shape.queries, shape.queries)],
                    (row, pl.ds(start, shape.queries), head),
                )

        for inside, outside in parts():
            plgpu.copy_gmem_to_smem(q.at[outside], inside, q_full.at[warpgroup])

        row_layout = plgpu.Layout.WGMMA.reduce(1)
        index = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout)
        if shape.queries < ROWS:
            index = index & (shape.queries - 1)
        # The last slot each row sees, or one before the first.
        last = jnp.minimum(index + (offset + start), length - 1)
        everybody_sees = jnp.minimum(offset + start + 1, length)
        scale = math.log2(math.e) / math.sqrt(shape.dim)

        def spread(x: Any, columns: int) -> Any:
            return lax.broadcast_in_dim(x, (ROWS, columns), [0])

        def masked(scores: Any, step: Any) -> Any:
            slots = plgpu.broadcasted_iota(jnp.int32, (ROWS, block), 1, layout=plgpu.Layout.WGMMA)
            return jnp.where(slots + step * block <= spread(last, block), scores, -jnp.inf)

        def softmax(scores: Any, maximum: Any, total: Any) -> Any:
            """Weights of a block, relative to the new maximum (in units of log2)."""
            new = jnp.maximum(maximum, scores.max(axis=1) * scale)
            weights = jnp.exp2(scores * scale - spread(new, block))
            shrink = jnp.exp2(maximum - new)
            total = total * shrink + weights.sum(axis=1)
            return weights.astype(q.dtype), new, total, shrink

        def zero_past_the_end() -> None:
            """0 * NaN is NaN: values past the row's length must not enter even with weight 0.

            Every consumer does this for itself; all of them write the same.
            """
            slot = lax.rem(end - 1 - begin, stages)
            left = length - (end - 1) * block

            @pl.when(left < block)
            def _clear() -> None:
                for first in range(0, block, ROWS):
                    ref = v_ring.at[slot, pl.ds(first, ROWS)]
                    values = compat.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
                    slots = plgpu.broadcasted_iota(
                        jnp.int32, (ROWS, shape.dim), 0, layout=plgpu.Layout.WGMMA
                    )
                    ref[...] = jnp.where(slots + first < left, values, jnp.zeros_like(values))
                plgpu.commit_smem()

        plgpu.barrier_wait(q_full.at[warpgroup])
        plgpu.barrier_wait(k_full.at[0])

        def first_scores(scores: Any) -> Any:
            plgpu.wgmma(scores, q_tile, k_ring.at[0].T)
            return scores[...]

        scores = pl.run_scoped(first_scores, plgpu.ACC((ROWS, block), jnp.float32))
        plgpu.barrier_arrive(k_free.at[0])
        maximum = plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), row_layout)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout)
        weights, maximum, total, _ = softmax(masked(scores, begin), maximum, total)

        def attend(values: Any) -> Any:
            def one_block(mask: bool, step: Any, carry: Any) -> Any:
                """Values of block `step`, scores of the next one."""
                weighing, maximum, total = carry
                slot = lax.rem(step - begin, stages)
                ahead = lax.rem(step + 1 - begin, stages)
                plgpu.barrier_wait(k_full.at[ahead])

                def products(scores: Any) -> Any:
                    plgpu.wgmma(scores, q_tile, k_ring.at[ahead].T)
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.wgmma(values, weighing, v_ring.at[slot])
                    # The softmax needs the first product only.
                    return plgpu.wgmma_accumulator_load(scores, wait_n=1)

                scores = pl.run_scoped(products, plgpu.ACC((ROWS, block), jnp.float32))
                plgpu.barrier_arrive(k_free.at[ahead])
                if mask:
                    scores = masked(scores, step + 1)
                weights, maximum, total, shrink = softmax(scores, maximum, total)
                weighted = plgpu.wgmma_accumulator_load(values, wait_n=0)
                # The second product reads the old weights from registers: alive until here, they
                # don't share them with the new weights, which would make the products wait.
                weighted, _ = lax.optimization_barrier((weighted, weighing))
                plgpu.barrier_arrive(v_free.at[slot])
                values[...] = weighted * spread(shrink, shape.dim)
                return weights, maximum, total

            whole = jnp.clip(lax.div(everybody_sees, block) - 1, begin, end - 1)
            carry = weights, maximum, total
            carry = lax.fori_loop(begin, whole, functools.partial(one_block, False), carry)
            carry = lax.fori_loop(whole, end - 1, functools.partial(one_block, True), carry)
            last_weights, last_maximum, last_total = carry
            slot = lax.rem(end - 1 - begin, stages)
            plgpu.barrier_wait(v_full.at[slot])
            zero_past_the_end()
            plgpu.wgmma(values, last_weights, v_ring.at[slot])
            return values[...], last_maximum, last_total

        values, maximum, total = pl.run_scoped(attend, plgpu.ACC((ROWS, shape.dim), jnp.float32))
        # Only a split can have seen nothing.
        values = values * spread(1 / jnp.maximum(total, 1e-30), shape.dim)
        if tiling.splits > 1:
            out[split, row, kv_head, tile] = values
            sums[0][split, row, kv_head, tile] = maximum + jnp.log2(jnp.maximum(total, 1e-30))
            return
        q_tile[...] = values.astype(q.dtype)
        plgpu.commit_smem()
        for inside, outside in parts():
            plgpu.copy_smem_to_gmem(inside, out.at[outside])
        plgpu.wait_smem_to_gmem(0)


def _combine(
    parts: Float[Array, "P B K tiles 64 H"],
    sums: Float[Array, "P B K tiles 64"],
    shape: Shape,
) -> Float[Array, "B T N H"]:
    # Written out, XLA makes one pass of it.
    largest = functools.reduce(jnp.maximum, sums)
    weights = [jnp.exp2(x - largest)[..., None] for x in sums]
    whole = sum(part * w for part, w in zip(parts, weights, strict=True)) / sum(weights)
    whole = whole.reshape(
        shape.rows,
        shape.kv_heads,
        shape.steps // shape.queries,
        shape.head_tiles * shape.tile_heads,
        shape.queries,
        shape.dim,
    )[:, :, :, : shape.group]
    # b k (position tile) g q h -> b (position tile) q k g h
    return whole.transpose(0, 2, 4, 1, 3, 5).reshape(
        shape.rows, shape.steps, shape.heads, shape.dim
    )
