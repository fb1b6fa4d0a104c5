"""One decode step of up to 64 rows as a single persistent kernel on Hopper.

It reads the same weight stream as the kernel of few rows and shares its attention. One warp fetches
the block's weights ahead, across phases; a thread of another fetches the inputs of products, each
once all blocks have passed the grid barrier before it.
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
from pallas_kernels.decode_step.common.exchange import Exchange, Section
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
from pallas_kernels.decode_step.common.record import Recorded
from pallas_kernels.decode_step.common.ring import Ring
from pallas_kernels.decode_step.common.work import Work
from pallas_kernels.decode_step.many_rows import products, side_warps
from pallas_kernels.decode_step.many_rows.inputs import MOST_STAGE_BYTES, InputLayout
from pallas_kernels.decode_step.many_rows.layout import (
    FLAGGED,
    GRID_BARRIER,
    MOST_ROWS,
    layout_of,
    record_layout,
)
from pallas_kernels.decode_step.many_rows.products import Products
from pallas_kernels.decode_step.many_rows.step import Step
from pallas_kernels.decode_step.many_rows.weight_ring import Group, Unit, WeightRing
from pallas_kernels.decode_step.packed.plan import HEAD, StepPlan
from pallas_kernels.decode_step.ptx import barriers
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import FORMATS

WEIGHT_STAGES = 16
"""In shared memory, at most."""
INPUT_BYTES = 3 * MOST_STAGE_BYTES
"""Shared memory for stages of an input."""
INPUT_STAGES = 12
"""At most."""
EARLY_BYTES = 128 << 20
"""Of a layer's keys and values, up to which the first are asked for before the queries come."""


class Memory(NamedTuple):
    """How a block's shared memory is divided: bytes of each region, in this order.

    Attributes:
        units: of weights.
        inputs: stages of the input of a product.
        sums: of an M-tile of each warp; in attention's turn, what the warps found.
        own: the hidden state of the block's M-tiles.
        heads: queries, key and value of the block's attention.
        scales: of norms.
        sizes: of the stages of weights, an int32 each.
        weight_turns, input_turns: two barriers a stage.
        cleared: one barrier.
    """

    units: int
    inputs: int
    sums: int
    own: int
    heads: int
    scales: int
    sizes: int
    weight_turns: int
    input_turns: int
    cleared: int


def memory(plan: StepPlan, rows: int) -> Memory:
    inputs = InputLayout(rows, FORMATS["bfloat16"])  # the other is as large
    others = (
        INPUT_BYTES,
        max(products.sums_bytes(inputs), attention.found_bytes(plan)),
        own_bytes(plan, rows),
        attention.heads_bytes(plan),
        2 * MOST_ROWS * 4,
        WEIGHT_STAGES * 4,
        WEIGHT_STAGES * 16,
        INPUT_STAGES * 16,
        16,
    )
    left = SHARED_BYTES - sum(others)
    unit = Unit.of(plan).bytes
    return Memory(max(0, left // unit) * unit, *others)


def groups_of(plan: StepPlan, rows: int) -> list[Group]:
    """How each phase's weights and inputs are cut into stages."""
    inputs, unit = InputLayout(rows, FORMATS["bfloat16"]), Unit.of(plan)
    room = memory(plan, rows).units // unit.bytes
    return [Group.of(phase, unit, room, inputs) for phase in plan.phases]


def refusal(plan: StepPlan, rows: int, cache: DTypeLike) -> str | None:
    """Why the kernel can't run a step, or None."""
    if why := unfit(plan, cache):
        return why
    if len({storage.format for storage in plan.storages}) > 1:
        # The hidden state is one input of several products.
        names = " and ".join(storage.name for storage in plan.storages)
        return f"products with {names} are taken in different formats, of one input"
    if rows > MOST_ROWS:
        return f"it takes at most {MOST_ROWS} rows, not {rows}"
    groups, room = groups_of(plan, rows), memory(plan, rows).units
    if room < (least := 2 * max(group.stage_bytes for group in groups)):
        return f"shared memory has room for {room} bytes of weights, not the {least} of two stages"
    for phase, group in zip(plan.phases, groups, strict=True):
        if len(phase.begins) > 1 and group.each > 1 and len(phase.storages) > 1:
            return f"a warp has {group.each} M-tiles of a phase whose segments are stored otherwise"
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
    """The kernel of many rows, as `kernels.build` describes it."""
    shape, blocks = plan.shape, plan.blocks
    divided, inputs = memory(plan, rows), InputLayout(rows, plan.phases[HEAD].format)
    splits = attention.most_splits(plan, rows, pool.capacity)
    layout, groups = layout_of(plan, inputs, splits, devices), groups_of(plan, rows)
    record = record_layout(plan, inputs) if recorded else None
    # All stages of inputs have the room that the longest takes.
    input_bytes = max(group.sixteens for group in groups) * inputs.fragment_bytes
    input_stages = min(INPUT_STAGES, INPUT_BYTES // input_bytes)

    def own_memory(smem: Any) -> list[t.V]:
        base = t.address(smem, shared=True)
        return [base + begin for begin in begins(divided)]

    def rings(smem: Any) -> tuple[WeightRing, Ring]:
        units, input_memory, *_, sizes, weight_turns, input_turns, _ = own_memory(smem)
        room, ring = (
            divided.units // groups[0].unit.bytes,
            Ring(sizes, weight_turns, WEIGHT_STAGES, 4),
        )
        weights = WeightRing(groups, units, room, ring)
        return weights, Ring(input_memory, input_turns, input_stages, input_bytes)

    def make(context: Any, smem: Any) -> None:
        def barriers_of_all() -> None:
            barriers.make_barrier(own_memory(smem)[-1], 1)
            weights, input_ring = rings(smem)
            weights.ring.make()
            input_ring.make()

        t.when(t.thread_id().equals(0), barriers_of_all)
        t.block_barrier(THREADS + FETCHERS)

    def others(context: Any, stream: Any, table: Any, words: Any, smem: Any) -> None:
        """What the warps do that don't compute."""
        work = Work.read(t.address(table), t.cta_id(), plan.blocks)
        exchange = Exchange(t.address(words), layout)
        weights, input_ring = rings(smem)
        *_, scales, _, _, _, cleared = own_memory(smem)
        warp, first = t.thread_id() // t.WARP, THREADS // t.WARP
        t.when(warp.equals(first), lambda: weights.fetch(plan, t.address(stream), work))

        def fetch_inputs() -> None:
            side_warps.fetch_inputs(plan, inputs, exchange, work, groups, input_ring, cleared)

        def make_scales() -> None:
            side_warps.make_scales(plan, exchange, inputs.format, warp - (first + 2), scales)

        t.when(t.thread_id().equals(THREADS + t.WARP), fetch_inputs)
        t.when(warp >= first + 2, make_scales)

    def made(context: Any, refs: tuple[Any, ...]) -> Step:
        """This block's part of the step, from all references but the weight stream."""
        given, smem, cta = Arguments.of(refs[:-1]), refs[-1], t.cta_id()
        _, _, sums, own, heads, scales, *_ = own_memory(smem)
        weights, input_ring = rings(smem)
        together = Devices.of(context, refs[EXCHANGE], refs[LOGITS], devices)
        exchange = Exchange.of(given.exchange, layout, record, together)

        def attn_out(head: t.V, column: t.V, values: list[t.V], layer: t.V, flag: t.V) -> None:
            at = exchange.at(Section.ATTN_OUT)
            column = head % shape.heads * shape.head_dim + column
            kept = exchange.kept(Recorded.ATTN_OUT, layer)
            inputs.put(at, head // shape.heads, column, values, kept)

        return Step(
            plan=plan,
            rows=rows,
            work=Work.read(given.table, cta, blocks),
            inputs=inputs,
            products=Products(inputs, weights, input_ring, sums),
            attention=Attention(
                plan, rows, splits, cta, PagedCache(shape, pool, given.pages, given.tables),
                given.rope, given.positions, given.new, exchange, heads, sums,
                FORMATS[jnp.dtype(cache).name], attn_out, EARLY_BYTES, several,
            ),
            own=own, scales=scales, given=given, exchange=exchange, trace=given.trace(cta),
        )  # fmt: skip

    def start(context: Any, *refs: Any) -> None:
        """Loads the embeddings, and clears the exchange."""
        this = made(context, refs)
        this.load_embeddings()

        def clear(section: int) -> None:
            begin, size = this.exchange.at(section), layout.sizes[section]

            def one(i: t.V, _: list[t.V]) -> list[t.V]:
                word = ((i * blocks + t.cta_id()) * THREADS + t.thread_id()) * 4
                at, nothing = begin + (word << 2).wide(), [t.integer(0)] * 4
                t.when(word < size, lambda: t.store_global(at, nothing))
                return []

            t.loop(-(-size // (4 * THREADS * blocks)), [], one)

        # Flag 0 is that of the layer before the first; the first waits for 1.
        for section in (*FLAGGED, GRID_BARRIER):
            clear(section)
        t.block_barrier(THREADS)

    def steps(context: Any, *refs: Any) -> None:
        t.when(t.thread_id().equals(0), lambda: barriers.arrive(own_memory(refs[-1])[-1]))
        made(context, refs).run()

    roles = Roles(make, others, start, steps)
    shared = sum(divided)
    words = layout.total + (record.total if record else 0)
    return persistent("decode_step_many", plan, rows, cache, words, shared, roles, traced, devices)
