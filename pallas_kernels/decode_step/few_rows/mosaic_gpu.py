"""One decode step of up to 16 rows as a single persistent kernel on Hopper.

One block a multiprocessor stays resident for the whole step. One thread fetches the block's
weights through a ring of shared memory that runs on across phases; blocks leave numbers for each
other in words that say which layer they belong to (`words.py`), so that inside the layers nobody
waits for anything but data.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.decode_step.common import attention
from pallas_kernels.decode_step.common import words as w
from pallas_kernels.decode_step.common.attention import Attention
from pallas_kernels.decode_step.common.cache import PagedCache, Pool
from pallas_kernels.decode_step.common.launch import (
    FETCHERS,
    RESERVED_BYTES,
    SMEM_BYTES,
    Roles,
    begins,
    persistent,
    unfit,
)
from pallas_kernels.decode_step.common.words import Layout
from pallas_kernels.decode_step.few_rows import products
from pallas_kernels.decode_step.few_rows.products import THREADS, Products
from pallas_kernels.decode_step.few_rows.step import PHASES, Step, Work
from pallas_kernels.decode_step.few_rows.stream import IN_FLIGHT, TILE_BYTES, Stream
from pallas_kernels.decode_step.packed.plan import BAND, OUTPUT, Plan
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import FORMATS

MOST_ROWS = 16
"""Rows of a step: so many by a band's 16 rows are the block's threads."""
FEWEST_STAGES = IN_FLIGHT
"""With fewer slots the fetching thread could wait for a page whose slot has gone on, forever."""

EARLY_BYTES = 2 << 20
"""Of a layer's keys and values, up to which the first are asked for before the queries come."""


class Memory(NamedTuple):
    """How a block's shared memory is divided: bytes of each piece, in this order.

    Attributes:
        ring: slots for pages of weights.
        inputs: of a product; in attention's turn, what its warps found.
        sums: of the warps.
        own: the hidden state of the block's bands.
        heads: queries, key and value of the block's attention.
        squares: sums of squares of norms.
        barriers: two a slot.
    """

    ring: int
    inputs: int
    sums: int
    own: int
    heads: int
    squares: int
    barriers: int

    @property
    def stages(self) -> int:
        """Slots of the ring."""
        return self.barriers // 16

    @property
    def slot_bytes(self) -> int:
        return self.ring // self.stages


def bands_at_once(plan: Plan, rows: int) -> int:
    """Bands whose sums are added up together: fewer where the inputs take up the memory."""
    # Each number of them is a thread's, of which MOST_ROWS rows of one band take all.
    usual = max(8 // rows, min(2, MOST_ROWS // rows))
    return usual if _divided(plan, rows, usual).stages >= FEWEST_STAGES else 1


def memory(plan: Plan, rows: int) -> Memory:
    return _divided(plan, rows, bands_at_once(plan, rows))


def _divided(plan: Plan, rows: int, bands: int) -> Memory:
    longest = max(phase.longest for phase in plan.phases)
    pieces = (
        max(products.input_bytes(longest, rows), attention.found_bytes(plan)),
        products.sums_bytes(bands, rows),
        int(plan.phases[OUTPUT].count.max()) * rows * BAND * 4,
        attention.heads_bytes(plan),
        MOST_ROWS * 4,
    )
    left = SMEM_BYTES - RESERVED_BYTES - sum(pieces)
    page = max(phase.page_tiles for phase in plan.phases) * TILE_BYTES
    stages = max(0, left // (page + 16))
    return Memory(stages * page, *pieces, stages * 16)


def refusal(plan: Plan, rows: int, dtype: DTypeLike) -> str | None:
    """Why the kernel can't run a step, or None.

    A plan whose blocks don't all fit at once would hang the GPU: they wait for each other.
    """
    shape = plan.shape
    if why := unfit(plan, dtype):
        return why
    if rows > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} rows, not {rows}"
    if rows * shape.kv_heads > plan.blocks:
        return f"{rows} rows of {shape.kv_heads} key/value heads are more than {plan.blocks} blocks"
    if (stages := memory(plan, rows).stages) < FEWEST_STAGES:
        return (
            f"beside {rows} rows of {shape.hidden} numbers, shared memory has room for {stages} "
            f"pages of weights, fewer than {FEWEST_STAGES}"
        )
    return None


@functools.cache
def build(
    plan: Plan, rows: int, pool: Pool, dtype: DTypeLike, traced: bool = False
) -> Callable[..., Any]:
    """The kernel of few rows, as `kernels.build` describes it."""
    shape, blocks = plan.shape, plan.blocks
    divided = memory(plan, rows)
    splits = attention.most_splits(plan, rows, pool.capacity)
    layout, format = Layout.of(plan, rows, splits), FORMATS[jnp.dtype(dtype).name]

    def start(context: Any, *refs: Any) -> None:
        """Leaves the embeddings for the first layer, and clears every other word."""
        begin = layout.begins[w.HIDDEN]
        hidden_at, words_at = t.address(refs[3]), t.address(refs[10])
        size = shape.hidden * rows

        def clear(i: t.V, _: list[t.V]) -> list[t.V]:
            word = ((i * blocks + t.block()) * THREADS + t.me()) * 4
            inside = (word >= begin) & (word < begin + size)
            source = hidden_at + ((word - begin) << 2).wide()
            # Tag 0 is that of the layer before the first; the first waits for 1.
            values = [v & -2 for v in t.load_global(source, 4, where=inside)]
            at = words_at + (word << 2).wide()
            t.when(word < layout.total, lambda: t.store_global(at, values))
            return []

        t.loop(-(-layout.total // (4 * THREADS * blocks)), [], clear)
        t.together(THREADS)

    def stream_in(smem: Any) -> Stream:
        base = t.address(smem, shared=True)
        return Stream(base, base + begins(divided)[-1], divided.stages, divided.slot_bytes)

    def make(context: Any, smem: Any) -> None:
        t.when(t.me().equals(0), stream_in(smem).make)
        t.together(THREADS + FETCHERS)

    def fetch(context: Any, tape: Any, table: Any, words: Any, smem: Any) -> None:
        work = Work.read(t.address(table) + (t.block() << 6).wide())

        def alone() -> None:
            stream = stream_in(smem)
            stream.fetch(plan, t.address(tape), work.tile, work.count, work.part_tiles)

        t.when(t.me().equals(THREADS), alone)

    def steps(context: Any, *refs: Any) -> None:
        *outside, smem = refs
        table, bias, norms, hidden, rope, pages, tables, positions, logits, new, words, *times = (
            map(t.address, outside)
        )
        base = t.address(smem, shared=True)
        _, inputs, sums, own, heads, squares, _ = (base + b for b in begins(divided))
        block = t.block()

        def attended(head: t.V, column: t.V, values: list[t.V], tag: t.V) -> None:
            at = layout.at(words, w.ATTENDED, head * shape.head_dim + column)
            w.leave(at, values, tag)

        step = Step(
            plan=plan,
            rows=rows,
            work=Work.read(table + (block << 6).wide()),
            products=Products(
                rows, stream_in(smem), inputs, sums, squares, bands_at_once(plan, rows), format
            ),
            attention=Attention(
                plan, rows, splits, block, PagedCache(shape, pool, pages, tables), rope, positions,
                new, words, layout, heads, inputs, format, attended, EARLY_BYTES,
            ),
            own=own, bias=bias, norms=norms, hidden=hidden, logits=logits,
            memory=words, layout=layout,
            times=times[0] + (block * (4 * len(PHASES))).wide() if traced else None,
        )  # fmt: skip
        step.begin()
        t.together(THREADS)
        step.run()

    roles = Roles(make, fetch, start, steps)
    shared = sum(divided)
    return persistent("decode_step", plan, rows, dtype, layout.total, shared, roles, traced)
