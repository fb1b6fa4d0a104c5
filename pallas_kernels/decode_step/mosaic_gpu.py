"""One decode step of one row as a single persistent kernel on Hopper.

One block a multiprocessor stays resident for the whole step. Its weights come through a ring
of shared-memory tiles that runs on across phases, so that the next phase's weights arrive
while the blocks wait for each other at a grid-wide barrier. The hidden state is small: every
block keeps its own copy, and all of them compute the norms.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels import compat
from pallas_kernels.decode_step.attention import SLOT_TILE, Attention
from pallas_kernels.decode_step.plan import COLUMNS, ROWS, Phase, Plan
from pallas_kernels.decode_step.tagged import empty_slots, tagged, totals
from pallas_kernels.decode_step.vectors import (
    ALONG_COLUMNS,
    MATRIX,
    columns_of,
    gmem,
    strided,
)

SMEM_BYTES = 232_448
"""Shared memory a block may have on Hopper."""
RESERVED_BYTES = 6 * 1024
"""For barriers, reductions across warps and alignment."""
GROUP = 8
"""Chunks of a vector that are fetched before any is stored, so that their loads overlap."""

HEAD_DIMS = (64, 128)
FEWEST_STAGES = 4
"""Weight tiles in flight below which the copies can't keep up with the reads."""


class Ring(NamedTuple):
    """Where a block's stream of weight tiles stands: the next to fetch, the slot to read."""

    fetch: jax.Array
    slot: jax.Array


class Memory(NamedTuple):
    """How a block's shared memory is divided.

    Attributes:
        kept: chunks of its input that a block reads, for each phase.
        inputs: numbers of the input vector.
        kv_stages: cache tiles in flight.
        stages: weight tiles in flight.
    """

    kept: tuple[int, ...]
    inputs: int
    kv_stages: int
    stages: int


def memory(plan: Plan) -> Memory:
    d, h = plan.shape.hidden, plan.shape.head_dim
    kept = tuple(min(p.across, p.most) for p in plan.phases)
    inputs = max(d, *(-(-kept[i] // GROUP) * GROUP * COLUMNS for i in (1, 3)))
    kv_stages = 2 if h == 64 else 1
    vectors = 4 * (d + inputs + ROWS * h)
    tiles = 2 * ROWS * h * (1 + 2 * kv_stages)
    left = SMEM_BYTES - RESERVED_BYTES - vectors - tiles
    return Memory(kept, inputs, kv_stages, left // (2 * ROWS * COLUMNS))


def refusal(plan: Plan, capacity: int, dtype: DTypeLike) -> str | None:
    """Why the kernel can't run a step, or None. A plan that doesn't fit would hang the GPU."""
    shape = plan.shape
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"the weights are {jnp.dtype(dtype).name}, not bfloat16"
    for rows, columns in shape.matrices:
        if rows % ROWS or columns % COLUMNS:
            return f"a matrix of {rows} x {columns} is not made of {ROWS} x {COLUMNS} tiles"
    if shape.head_dim not in HEAD_DIMS:
        return f"the head dimension is {shape.head_dim}, neither 64 nor 128"
    if shape.group > 8:
        return f"{shape.group} query heads share a key/value head, more than 8"
    if shape.kv_heads > plan.blocks:
        return f"{shape.kv_heads} key/value heads are more than {plan.blocks} blocks"
    if capacity % SLOT_TILE:
        return f"the cache's {capacity} slots are not a multiple of {SLOT_TILE}"
    if (stages := memory(plan).stages) < FEWEST_STAGES:
        return f"shared memory has room for {stages} weight tiles, fewer than {FEWEST_STAGES}"
    return None


@functools.cache
def build(plan: Plan, capacity: int) -> Callable[..., Any]:
    """The kernel for one model, cache capacity and number of blocks.

    Returns a function of (tape, bias, norms, hidden, rope, cache, position) to (logit parts,
    new keys and values, scratch ...).
    """
    shape, blocks = plan.shape, plan.blocks
    d, h, half = shape.hidden, shape.head_dim, shape.head_dim // 2
    kv_heads = shape.kv_heads
    splits = max(1, min(blocks // kv_heads, capacity // SLOT_TILE))
    _, out, gate_up, down, _ = plan.phases
    kept, input_width, kv_stages, stages = memory(plan)
    # A head of 64 dimensions is read together with the 64 numbers after it.
    widths = [-(-(p.slots * p.rows + 64) // 128) * 128 for p in plan.phases]

    def body(*refs: Any) -> None:
        tape, bias, norms, hidden, rope, cache, position = refs[:7]
        logits, new, *sums, att_out, att_ml = refs[7:15]
        ring, x, xs, q_raw, q, k_tile, v_tile, full, kv_full = refs[15:]
        qkv_sum, out_sum, gate_up_sum, down_sum = sums
        block = lax.axis_index("sm")
        semaphore = pl.get_global(plgpu.SemaphoreType.REGULAR)
        firsts = [p.first(block) for p in plan.phases]
        counts = [p.first(block + 1) - f for p, f in zip(plan.phases, firsts, strict=True)]
        start = shape.layers * sum(firsts[:4]) + firsts[4]
        total = shape.layers * sum(counts[:4]) + counts[4]

        def everyone(n: Any) -> None:
            """The n-th barrier across all blocks, from 1."""
            with jax.named_scope("barrier"):
                plgpu.semaphore_signal(semaphore, 1, memory_scope="gpu")
                plgpu.semaphore_wait(semaphore, n * blocks, memory_scope="gpu", decrement=False)

        def fetch(tile: jax.Array, slot: jax.Array | int) -> None:
            @pl.when(tile < total)
            def _() -> None:
                plgpu.copy_gmem_to_smem(tape.at[start + tile], ring.at[slot], full.at[slot])

        def product(phase: int, sums: Any, whole: bool, tag: Any, ring_at: Ring) -> Ring:
            """This block's tiles of a matrix times the vector in `xs`."""
            p, first, count = plan.phases[phase], firsts[phase], counts[phase]

            def tile(j: jax.Array, carry: Any) -> Any:
                ring_at, acc = carry
                plgpu.barrier_wait(full.at[ring_at.slot])
                weights = compat.load(ring.at[ring_at.slot], layout=MATRIX).astype(jnp.float32)
                k = lax.rem(first + j, p.across)
                chunk = k if whole else lax.rem(j, p.across)
                part = compat.load(xs.at[pl.ds(chunk * COLUMNS, COLUMNS)], layout=ALONG_COLUMNS)
                acc = acc + weights * columns_of(part)
                plgpu.commit_smem()
                fetch(ring_at.fetch, ring_at.slot)
                row_ends = k == p.across - 1

                @pl.when(row_ends | (j == count - 1))
                def _() -> None:
                    row = lax.div(first + j, p.across)
                    slot = block - p.owner(row * p.across)
                    part = acc.sum(axis=1)
                    part = part if tag is None else tagged(part, tag)
                    sums[pl.ds(slot * p.rows + row * ROWS, ROWS)] = part

                slot = jnp.where(ring_at.slot == stages - 1, 0, ring_at.slot + 1)
                return Ring(ring_at.fetch + 1, slot), acc * jnp.where(row_ends, 0.0, 1.0)

            zero = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), MATRIX)
            ring_at, _ = lax.fori_loop(0, count, tile, (ring_at, zero))
            return ring_at

        def normalise(sums: Any, p: Phase, norm: Any, tag: Any) -> None:
            """Adds a product to the hidden state; its norm becomes the next input."""
            weight = gmem(norms.at[norm], strided(d))  # on its way while the sums are added up
            v = compat.load(x, layout=strided(d)) + totals(sums, p, [(0, d)], tag)[0]
            x[...] = v
            v = v * lax.rsqrt(jnp.sum(v * v) / d + shape.eps)
            xs[pl.ds(0, d)] = v * weight

        def fill(phase: int, chunks: Callable[[list[Any]], list[list[jax.Array]]]) -> None:
            """The chunks of its input that this block's run of a phase reads, in run order."""
            p = plan.phases[phase]

            def some(i: jax.Array, _: Any) -> None:
                wanted = [i * GROUP + n for n in range(min(GROUP, kept[phase]))]
                values = chunks([lax.rem(firsts[phase] + w, p.across) for w in wanted])
                for w, parts in zip(wanted, values, strict=True):
                    for n, part in enumerate(parts):
                        width = part.shape[0]
                        xs[pl.ds(w * COLUMNS + n * width, width)] = part

            lax.fori_loop(0, -(-kept[phase] // GROUP), some, None)

        def swiglu(chunks: list[Any], tag: Any) -> list[list[jax.Array]]:
            runs = [(base + k * COLUMNS, COLUMNS) for k in chunks for base in (0, shape.ffn)]
            each = totals(gate_up_sum, gate_up, runs, tag)
            pairs = zip(each[::2], each[1::2], strict=True)
            return [[gate / (1 + jnp.exp(-gate)) * up] for gate, up in pairs]

        attention = Attention(
            plan, splits, kv_stages, block, position[0],
            bias, qkv_sum, rope, cache, new, att_out, att_ml,
            q_raw, q, (k_tile, v_tile), kv_full,
        )  # fmt: skip

        for p, buffer, width in zip(plan.phases, sums, widths, strict=False):
            # Block b prepares pieces b, b + blocks, ...
            pieces = lax.div(width // 128 - block + blocks - 1, blocks)

            def clear(i: jax.Array, _: None, p: Phase = p, buffer: Any = buffer) -> None:
                at = (i * blocks + block) * 128
                buffer[pl.ds(at, 128)] = empty_slots(p, at)

            lax.fori_loop(0, pieces, clear, None)

        for stage in range(stages):
            fetch(jnp.int32(stage), stage)
        x[...] = gmem(hidden, strided(d))
        everyone(1)

        def layer(index: jax.Array, ring_at: Ring) -> Ring:
            # Layers take turns; what the first finds of the last product is the zeroes above.
            tag, before = (index + 1) & 1, index & 1
            attention.prefetch(index)
            with jax.named_scope("attn_norm"):
                normalise(down_sum, down, 2 * index, before)
            with jax.named_scope("qkv_proj"):
                ring_at = product(0, qkv_sum, True, tag, ring_at)

            @pl.when(attention.attends)
            def _() -> None:
                with jax.named_scope("attention"):
                    attention.attend(index, tag)

            # The only barrier of a layer. It also keeps every block within a layer of the
            # others, so that no word is overwritten before whoever waits for it has seen it.
            everyone(2 + index)
            with jax.named_scope("combine"):
                fill(1, attention.combined)
            with jax.named_scope("o_proj"):
                ring_at = product(1, out_sum, False, tag, ring_at)
            with jax.named_scope("ffn_norm"):
                normalise(out_sum, out, 2 * index + 1, tag)
            with jax.named_scope("gate_up_proj"):
                ring_at = product(2, gate_up_sum, True, tag, ring_at)
            with jax.named_scope("swiglu"):
                fill(3, lambda chunks: swiglu(chunks, tag))
            with jax.named_scope("down_proj"):
                return product(3, down_sum, False, tag, ring_at)

        ring_at = lax.fori_loop(0, shape.layers, layer, Ring(jnp.int32(stages), jnp.int32(0)))
        with jax.named_scope("final_norm"):
            normalise(down_sum, down, 2 * shape.layers, jnp.int32(shape.layers & 1))
        with jax.named_scope("lm_head"):
            product(4, logits, True, None, ring_at)

    def f32(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    def tiles(count: int, width: int, columns: int) -> Any:
        transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))
        dims = (count, ROWS, width) if count else (ROWS, width)
        return plgpu.SMEM(dims, jnp.bfloat16, transforms=transforms)

    return compat.kernel(
        body,
        name="decode_step",
        out_type=(
            f32(widths[4]),
            f32(2 * shape.layers, kv_heads * h),
            *(f32(width) for width in widths[:4]),
            f32(blocks, ROWS, h),
            f32(blocks, 2, ROWS),
        ),
        grid=(blocks,),
        grid_names=("sm",),
        scratch_types=(
            tiles(stages, COLUMNS, 64),
            plgpu.SMEM((d,), jnp.float32),
            plgpu.SMEM((input_width,), jnp.float32),
            plgpu.SMEM((ROWS * h,), jnp.float32),
            tiles(0, h, half),
            tiles(kv_stages, h, half),
            tiles(kv_stages, h, half),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=kv_stages),
        ),
        approx_math=True,
    )
