"""One decode step of up to 64 rows as a single persistent kernel on Hopper.

It reads the same tape as the kernel of few rows and shares its attention. One warp fetches the
block's weights ahead, across phases; a thread of another fetches the inputs of products, each
once all blocks have left their share of it.
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
from pallas_kernels.decode_step.common.ring import Ring
from pallas_kernels.decode_step.few_rows.products import THREADS
from pallas_kernels.decode_step.few_rows.step import PHASES, Work
from pallas_kernels.decode_step.many_rows import exchange, products, warps
from pallas_kernels.decode_step.many_rows.exchange import MOST_ROWS
from pallas_kernels.decode_step.many_rows.pages import MOST_BANDS, UNIT_BYTES, Pages
from pallas_kernels.decode_step.many_rows.products import Products
from pallas_kernels.decode_step.many_rows.step import Step
from pallas_kernels.decode_step.many_rows.texts import Texts
from pallas_kernels.decode_step.packed.plan import BAND, OUTPUT, Plan
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import FORMATS

PAGES = 16
"""Of weights in shared memory, at most."""
FEWEST_UNITS = 2 * MOST_BANDS
"""Of weights: two of the largest pages."""
CHUNKS_BYTES = 48 * 1024
"""Shared memory for chunks of an input, about."""
EARLY_BYTES = 128 << 20
"""Of a layer's keys and values, up to which the first are asked for before the queries come."""


class Memory(NamedTuple):
    """How a block's shared memory is divided: bytes of each piece, in this order.

    Attributes:
        units: of weights.
        chunks: of the input of a product.
        sums: of a band of each warp; in attention's turn, what the warps found.
        own: the hidden state of the block's bands.
        heads: queries, key and value of the block's attention.
        scales: of norms.
        sizes: of the pages, an int32 each.
        page_turns, chunk_turns: two barriers each.
        cleared: one barrier.
    """

    units: int
    chunks: int
    sums: int
    own: int
    heads: int
    scales: int
    sizes: int
    page_turns: int
    chunk_turns: int
    cleared: int


def memory(plan: Plan, rows: int) -> Memory:
    texts = Texts(rows, FORMATS["bfloat16"])  # the other is as large
    chunks = max(3, CHUNKS_BYTES // texts.chunk_bytes)
    pieces = (
        chunks * texts.chunk_bytes,
        max(products.sums_bytes(texts), attention.found_bytes(plan)),
        int(plan.phases[OUTPUT].count.max()) * rows * BAND * 4,
        attention.heads_bytes(plan),
        2 * MOST_ROWS * 4,
        PAGES * 4,
        PAGES * 16,
        chunks * 16,
        16,
    )
    left = SMEM_BYTES - RESERVED_BYTES - sum(pieces)
    return Memory(max(0, left // UNIT_BYTES) * UNIT_BYTES, *pieces)


def refusal(plan: Plan, rows: int, dtype: DTypeLike) -> str | None:
    """Why the kernel can't run a step, or None."""
    if why := unfit(plan, dtype):
        return why
    if rows > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} rows, not {rows}"
    if (units := memory(plan, rows).units // UNIT_BYTES) < FEWEST_UNITS:
        return f"shared memory has room for {units * UNIT_BYTES} bytes of weights"
    return None


@functools.cache
def build(
    plan: Plan, rows: int, pool: Pool, dtype: DTypeLike, traced: bool = False
) -> Callable[..., Any]:
    """The kernel of many rows, as `kernels.build` describes it."""
    shape, blocks = plan.shape, plan.blocks
    divided, texts = memory(plan, rows), Texts(rows, FORMATS[jnp.dtype(dtype).name])
    splits = attention.most_splits(plan, rows, pool.capacity)
    layout = exchange.layout_of(plan, texts, splits)

    def own_memory(smem: Any) -> list[t.V]:
        base = t.address(smem, shared=True)
        return [base + begin for begin in begins(divided)]

    def streams(smem: Any) -> tuple[Pages, Ring]:
        units, chunks, *_, sizes, page_turns, chunk_turns, _ = own_memory(smem)
        pages = Pages(units, divided.units // UNIT_BYTES, Ring(sizes, page_turns, PAGES, 4))
        stages = divided.chunk_turns // 16
        return pages, Ring(chunks, chunk_turns, stages, texts.chunk_bytes)

    def work_of(table: Any) -> Work:
        return Work.read(t.address(table) + (t.block() << 6).wide())

    def make(context: Any, smem: Any) -> None:
        def barriers_of_all() -> None:
            barriers.make_barrier(own_memory(smem)[-1], 1)
            pages, chunks = streams(smem)
            pages.ring.make()
            chunks.make()

        t.when(t.me().equals(0), barriers_of_all)
        t.together(THREADS + FETCHERS)

    def others(context: Any, tape: Any, table: Any, words: Any, smem: Any) -> None:
        """What the warps do that don't compute."""
        work, memory = work_of(table), t.address(words)
        pages, chunks = streams(smem)
        *_, scales, _, _, _, cleared = own_memory(smem)
        warp, first = t.me() // t.WARP, THREADS // t.WARP
        t.when(warp.equals(first), lambda: pages.fetch(plan, t.address(tape), work))

        def inputs() -> None:
            warps.fetch_inputs(plan, texts, layout, memory, work, chunks, cleared)

        def norms() -> None:
            which = warp - (first + 2)
            warps.make_scales(plan, layout, texts.format, memory, which, scales)

        t.when(t.me().equals(THREADS + t.WARP), inputs)
        t.when(warp >= first + 2, norms)

    def made(refs: tuple[Any, ...]) -> Step:
        """This block's part of the step, from all references but the tape."""
        *outside, smem = refs
        table, bias, norms, hidden, rope, kv, tables, positions, logits, new, words, *times = (
            outside
        )
        _, _, sums, own, heads, scales, *_ = own_memory(smem)
        pages, chunks = streams(smem)
        memory, block = t.address(words), t.block()
        cache = PagedCache(shape, pool, t.address(kv), t.address(tables))

        def attended(head: t.V, column: t.V, values: list[t.V], tag: t.V) -> None:
            at = layout.at(memory, w.ATTENDED)
            column = head % shape.heads * shape.head_dim + column
            texts.put(at, head // shape.heads, column, values)

        return Step(
            plan=plan,
            texts=texts,
            work=work_of(table),
            products=Products(texts, pages, chunks, sums),
            attention=Attention(
                plan, rows, splits, block, cache, t.address(rope), t.address(positions),
                t.address(new), memory, layout, heads, sums, texts.format, attended, EARLY_BYTES,
            ),
            own=own, scales=scales, bias=t.address(bias), norms=t.address(norms),
            hidden=t.address(hidden), logits=t.address(logits), memory=memory, layout=layout,
            times=t.address(times[0]) + (block * (4 * len(PHASES))).wide() if traced else None,
        )  # fmt: skip

    def start(context: Any, *refs: Any) -> None:
        """Takes the embeddings, and clears the words."""
        this = made(refs)
        this.begin()

        def clear(section: int) -> None:
            begin, size = layout.at(this.memory, section), layout.sizes[section]

            def one(i: t.V, _: list[t.V]) -> list[t.V]:
                word = ((i * blocks + t.block()) * THREADS + t.me()) * 4
                at, nothing = begin + (word << 2).wide(), [t.integer(0)] * 4
                t.when(word < size, lambda: t.store_global(at, nothing))
                return []

            t.loop(-(-size // (4 * THREADS * blocks)), [], one)

        # Tag 0 is that of the layer before the first; the first waits for 1.
        for section in (w.QKV, w.PARTS, w.SPLITS, w.STATS, exchange.MEETINGS):
            clear(section)
        t.together(THREADS)

    def steps(context: Any, *refs: Any) -> None:
        t.when(t.me().equals(0), lambda: barriers.arrive(own_memory(refs[-1])[-1]))
        made(refs).run()

    roles = Roles(make, others, start, steps)
    shared = sum(divided)
    return persistent("decode_step_many", plan, rows, dtype, layout.total, shared, roles, traced)
