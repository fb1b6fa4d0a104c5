"""One decode step of up to 16 rows as a single persistent kernel on Hopper.

One block a multiprocessor stays resident for the whole step. One thread fetches the block's
weights through a ring of shared memory that runs on across phases; blocks publish numbers
for each other with a flag (`common/exchange.py`), so that inside the layers nobody waits for
anything but data.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.decode_step.common import attention
from pallas_kernels.decode_step.common.attention import Attention
from pallas_kernels.decode_step.common.cache import PagedCache, Pool
from pallas_kernels.decode_step.common.devices import Devices
from pallas_kernels.decode_step.common.exchange import Exchange, Layout, Section, publish
from pallas_kernels.decode_step.common.launch import (
    EXCHANGE,
    FETCHERS,
    LOGITS,
    SHARED_BYTES,
    THREADS,
    Arguments,
    Roles,
    begins,
    persistent,
    unfit,
)
from pallas_kernels.decode_step.common.phases import own_bytes
from pallas_kernels.decode_step.common.record import Recorded, RecordLayout
from pallas_kernels.decode_step.common.work import Work
from pallas_kernels.decode_step.few_rows.inputs import Inputs, input_bytes
from pallas_kernels.decode_step.few_rows.products import Products, sums_bytes
from pallas_kernels.decode_step.few_rows.stages import Stages, cut, longest
from pallas_kernels.decode_step.few_rows.step import Step
from pallas_kernels.decode_step.few_rows.weight_ring import WeightRing, in_flight
from pallas_kernels.decode_step.packed.plan import StepPlan
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import FORMATS

MOST_ROWS = 16
"""Rows of a step: so many by an M-tile's 16 outputs are the block's threads."""

EARLY_BYTES = 2 << 20
"""Of a layer's keys and values, up to which the first are asked for before the queries come."""


class Memory(NamedTuple):
    """How a block's shared memory is divided: bytes of each region, in this order.

    Attributes:
        ring: stages of weights.
        inputs: of a product; in attention's turn, what its warps found.
        sums: of the warps.
        own: the hidden state of the block's M-tiles.
        heads: queries, key and value of the block's attention.
        squares: sums of squares of norms.
        barriers: two a stage.
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
        """Of the ring."""
        return self.barriers // 16


class Divided(NamedTuple):
    """A block's shared memory, and what goes through it.

    Attributes:
        m_tiles: whose sums are added up together.
        cut: each phase's M-tiles into stages.
    """

    memory: Memory
    m_tiles: int
    cut: list[Stages]

    @property
    def fewest(self) -> int:
        """Stages that the ring needs."""
        return in_flight(longest(self.cut))


def divided(plan: StepPlan, rows: int) -> Divided:
    """Fewer M-tiles at once where the inputs take up the memory."""
    # Each number of them is a thread's, of which MOST_ROWS rows of one M-tile take all.
    usual = _divided(plan, rows, max(8 // rows, min(2, MOST_ROWS // rows)))
    return usual if usual.memory.stages >= usual.fewest else _divided(plan, rows, 1)


def memory(plan: StepPlan, rows: int) -> Memory:
    return divided(plan, rows).memory


def _divided(plan: StepPlan, rows: int, m_tiles: int) -> Divided:
    others = (
        max(input_bytes(plan, rows), attention.found_bytes(plan)),
        sums_bytes(m_tiles, rows),
        own_bytes(plan, rows),
        attention.heads_bytes(plan),
        MOST_ROWS * 4,
    )
    left = SHARED_BYTES - sum(others)
    stages = cut(plan, left)
    count = max(0, left // (longest(stages) + 16))
    return Divided(Memory(count * longest(stages), *others, count * 16), m_tiles, stages)


def refusal(plan: StepPlan, rows: int, cache: DTypeLike) -> str | None:
    """Why the kernel can't run a step, or None.

    A plan whose blocks don't all fit at once would hang the GPU: they wait for each other.
    """
    shape = plan.shape
    if why := unfit(plan, cache):
        return why
    if rows > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} rows, not {rows}"
    if rows * shape.kv_heads > plan.blocks:
        return f"{rows} rows of {shape.kv_heads} key/value heads are more than {plan.blocks} blocks"
    found = divided(plan, rows)
    if found.memory.stages < found.fewest:
        return (
            f"beside {rows} rows of {shape.hidden} numbers, shared memory has room for "
            f"{found.memory.stages} stages of weights, fewer than {found.fewest}"
        )
    return None


@functools.cache
def build(
    plan: StepPlan,
    rows: int,
    pool: Pool,
    cache: DTypeLike,
    traced: bool = False,
    recorded: bool = False,
    several: bool = False,
    devices: int = 1,
) -> Callable[..., Any]:
    """The kernel of few rows, as `kernels.build` describes it."""
    shape, blocks = plan.shape, plan.blocks
    memory, m_tiles, stages = divided(plan, rows)
    splits = attention.most_splits(plan, rows, pool.capacity)
    layout = Layout.of(plan, rows, splits, devices)
    record = RecordLayout.of(plan, rows) if recorded else None

    def start(context: Any, *refs: Any) -> None:
        """Publishes the embeddings for the first layer, and clears every other word."""
        begin, given = layout.begins[Section.HIDDEN], Arguments.of(refs[:-1])
        size = shape.hidden * rows

        def clear(i: t.V, _: list[t.V]) -> list[t.V]:
            word = ((i * blocks + t.cta_id()) * THREADS + t.thread_id()) * 4
            inside = (word >= begin) & (word < begin + size)
            source = given.hidden + ((word - begin) << 2).wide()
            # Flag 0 is that of the layer before the first; the first waits for 1.
            values = [v & -2 for v in t.load_global(source, 4, where=inside)]
            at = given.exchange + (word << 2).wide()
            t.when(word < layout.total, lambda: t.store_global(at, values))
            if kept := Exchange.of(given.exchange, layout, record).record:
                again = kept.at(Recorded.HIDDEN, 0, word - begin)
                t.when(inside, lambda: t.store_global(again, values))
            return []

        t.loop(-(-layout.total // (4 * THREADS * blocks)), [], clear)
        t.block_barrier(THREADS)

    def weights_in(smem: Any) -> WeightRing:
        base = t.address(smem, shared=True)
        return WeightRing(base, base + begins(memory)[-1], memory.stages, stages)

    def make(context: Any, smem: Any) -> None:
        t.when(t.thread_id().equals(0), weights_in(smem).make)
        t.block_barrier(THREADS + FETCHERS)

    def fetch(context: Any, stream: Any, table: Any, words: Any, smem: Any) -> None:
        work = Work.read(t.address(table), t.cta_id(), blocks)

        def alone() -> None:
            weights_in(smem).fetch(plan, t.address(stream), work)

        t.when(t.thread_id().equals(THREADS), alone)

    def steps(context: Any, *refs: Any) -> None:
        given, smem, cta = Arguments.of(refs[:-1]), refs[-1], t.cta_id()
        base = t.address(smem, shared=True)
        _, operands, sums, own, heads, squares, _ = (base + b for b in begins(memory))
        most_tiles = max(phase.longest for phase in plan.phases)
        inputs = Inputs(rows, most_tiles, operands, squares)
        together = Devices.of(context, refs[EXCHANGE], refs[LOGITS], devices)
        words = Exchange.of(given.exchange, layout, record, together)

        def attn_out(head: t.V, column: t.V, values: list[t.V], layer: t.V, flag: t.V) -> None:
            at = words.at(Section.ATTN_OUT, head * shape.head_dim + column)
            kept = words.kept(Recorded.ATTN_OUT, layer, head, shape.head_dim, column)
            publish(at, values, flag, kept)

        step = Step(
            plan=plan,
            rows=rows,
            work=Work.read(given.table, cta, blocks),
            inputs=inputs,
            products=Products(inputs, weights_in(smem), sums, m_tiles),
            attention=Attention(
                plan, rows, splits, cta, PagedCache(shape, pool, given.pages, given.tables),
                given.rope, given.positions, given.new, words, heads, operands,
                FORMATS[jnp.dtype(cache).name], attn_out, EARLY_BYTES, several,
            ),
            own=own, given=given, exchange=words, trace=given.trace(cta),
        )  # fmt: skip
        step.load_embeddings()
        t.block_barrier(THREADS)
        step.run()

    roles = Roles(make, fetch, start, steps)
    shared = sum(memory)
    words = layout.total + (record.total if record else 0)
    return persistent("decode_step", plan, rows, cache, words, shared, roles, traced, devices)
