"""A product of many rows with weights of the stream, on Hopper.

Weights are the first operand of a warpgroup's products, which lanes load as they lie in the stream
and make numbers of in registers; x is the second, in shared memory. Two warpgroups have half of a
piece's M-tiles each, so that one makes operands while the other's products run; a warp of a third
one fetches ahead, across pieces.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.decode_step.common.launch import FETCHERS, SHARED_BYTES, THREADS, by_role
from pallas_kernels.decode_step.common.ring import Ring, RingState
from pallas_kernels.decode_step.packed.packing import Packed
from pallas_kernels.decode_step.packed.plan import DOWN, GATE_UP, StepPlan
from pallas_kernels.decode_step.packed.storages import STORAGES
from pallas_kernels.decode_step.packed.tile import WARPS
from pallas_kernels.decode_step.ptx import barriers, warpgroup
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import FORMATS
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.lazy import lazy
from pallas_kernels.packed_product.outputs import Outputs
from pallas_kernels.packed_product.pieces import Piece, Shape
from pallas_kernels.packed_product.tiling import M_TILES, Tiling

plgpu = lazy("jax.experimental.pallas.mosaic_gpu")

AT_ONCE = 2
"""Times 16 columns that are multiplied together, at least."""
MOST_STAGES = 6


def refusal(plan: StepPlan, phase: int, layer: int, dtype: jnp.dtype) -> str | None:
    """Why the kernel can't make a product of that dtype, or None."""
    for name in plan.stored(phase, layer):
        if STORAGES[name].format is None:
            return f"the weights are {name}, which no kernel multiplies"
    if dtype.name not in (*FORMATS, "float32"):
        return f"the result is {dtype.name}, not {', '.join(FORMATS)} or float32"
    return None


def input_dtype(plan: StepPlan, phase: int, layer: int) -> str:
    """In which products are taken."""
    format = STORAGES[plan.stored(phase, layer)[0]].format
    return next(name for name, each in FORMATS.items() if each == format)


class Inputs(NamedTuple):
    """A product's other operand, in `input_dtype`.

    Attributes:
        numbers: `[rows, in]`, or as products take them, `[blocks, numbers]`.
        rows: how many there are.
        arranged: rows of a block, or 0 where they are not in the order of products.
    """

    numbers: Array
    rows: int
    arranged: int = 0

    def blocks_of(self, rows: int) -> Float[Array, "blocks numbers"]:
        return self.numbers if self.arranged == rows else _arranged(self.numbers, rows)


def product(
    packed: Packed, plan: StepPlan, phase: int, layer: int, x: Inputs, dtype: jnp.dtype
) -> Float[Array, "rows out"]:
    """As `packed_product` has it."""
    found, blocks_of = [], functools.cache(x.blocks_of)
    for cut, at in _cuts(packed, plan, phase, layer, x.rows):
        whole = cut.tiling.splits == 1
        run = _build(*cut, plan.blocks, Outputs(dtype.name if whole else "float32"))
        parts = run(packed.stream, at, blocks_of(cut.tiling.rows), _UNSCALED)
        found.append(parts[0] if whole else parts.sum(axis=0).astype(dtype))
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)


def gates_itself(plan: StepPlan, layer: int, rows: int) -> bool:
    """Whether pieces of gate and up have whole sums, as `gated` needs them."""
    return all(
        _cut(plan, GATE_UP, name, rows, plan.phases[GATE_UP].m_tiles).tiling.splits == 1
        for name in plan.stored(GATE_UP, layer)
    )


def gated(
    packed: Packed,
    plan: StepPlan,
    layer: int,
    x: Inputs,
    scales: Float[Array, " rows"] | None,
    dtype: jnp.dtype,
    *,
    arranged: bool,
) -> Inputs:
    """silu(gate) * up, of sums that are multiplied with their row's scale before.

    Args:
        arranged: whether to leave it in the order in which the down projection takes it.
    """
    ((cut, at),) = _cuts(packed, plan, GATE_UP, layer, x.rows)
    ((down, _),) = _cuts(packed, plan, DOWN, layer, x.rows)
    each = down.tiling.rows if arranged else 0
    outputs = Outputs(dtype.name, gated=True, scaled=scales is not None, arranged=each)
    given = packed.stream, at, x.blocks_of(cut.tiling.rows)
    found = _build(*cut, plan.blocks, outputs)(*given, _UNSCALED if scales is None else scales)
    return Inputs(found[0], x.rows, each)


_UNSCALED = np.zeros(1, np.float32)


class Cut(NamedTuple):
    """A product and how it is cut."""

    shape: Shape
    tiling: Tiling


def _cut(plan: StepPlan, phase: int, name: str, rows: int, m_tiles: int) -> Cut:
    across = plan.phases[phase].across
    shape = Shape(name, m_tiles, across, rows, phase == GATE_UP, plan.granule_bytes)
    return Cut(shape, Tiling.of(m_tiles, across, rows, plan.blocks))


def _cuts(
    packed: Packed, plan: StepPlan, phase: int, layer: int, rows: int
) -> Iterator[tuple[Cut, Int[Array, " tiles"]]]:
    """The products that a matrix takes, one for each way in which some of it is stored, and where
    their tiles begin."""
    names, across = plan.stored(phase, layer), plan.phases[phase].across
    begin = plan.begin(packed.tile_offsets, phase, layer)
    segments = [begin[plan.tiles_of(phase, n)] for n in range(len(names))]
    if len({*names}) == 1:
        names, segments = names[:1], [begin]
    for name, at in zip(names, segments, strict=True):
        yield _cut(plan, phase, name, rows, len(at) // across), at


def _arranged(x: Float[Array, "rows in"], each: int) -> Float[Array, "blocks numbers"]:
    """x as products take it, of so many rows a block: `many_rows.inputs` says in which order."""
    rows, columns = x.shape
    blocks = -(-rows // each)
    padded = jnp.pad(x, ((0, blocks * each - rows), (0, 0)))
    # [block, eight, row, sixteen, t, half, e]
    grid = padded.reshape(blocks, each // 8, 8, columns // 16, 4, 2, 2)
    return grid.transpose(0, 3, 1, 5, 2, 4, 6).reshape(blocks, -1)


@functools.cache
def _build(shape: Shape, tiling: Tiling, blocks: int, outputs: Outputs) -> Callable[..., Any]:
    """A kernel of (weight stream, tiles' first granules, arranged x, scales of rows) to
    `[splits, rows, out]`, or one block of all that is arranged."""
    tile_bytes = shape.storage.tile_bytes
    sixteen_bytes = tiling.rows // 8 * warpgroup.EIGHT_BYTES
    weight_bytes, input_bytes = M_TILES * tile_bytes, WARPS * sixteen_bytes
    stage_bytes = weight_bytes + input_bytes
    stages = min(MOST_STAGES, SHARED_BYTES // (stage_bytes + 16))
    groups = -(-shape.m_tiles // M_TILES)
    pieces = groups * tiling.row_blocks(shape.rows) * tiling.splits

    def ring_in(smem: Any) -> Ring:
        base = t.address(smem, shared=True)
        return Ring(base, base + stages * stage_bytes, stages, stage_bytes)

    def over_pieces(state: RingState, body: Callable[[Piece, RingState], RingState]) -> None:
        def turn(i: V, carry: list[V]) -> list[V]:
            return [*body(Piece(shape, tiling, t.cta_id() + i * blocks), RingState(*carry))]

        t.loop((t.integer(pieces) - t.cta_id() + (blocks - 1)) // blocks, [*state], turn)

    def make(context: Any, smem: Any) -> None:
        t.when(t.thread_id().equals(0), ring_in(smem).make)
        t.block_barrier(THREADS + FETCHERS)

    def fetch(context: Any, *refs: Any) -> None:
        """For one warp, of which eight lanes have an M-tile each, and one has x."""
        stream, offsets, x = map(t.address, refs[:3])
        ring, lane = ring_in(refs[3]), t.thread_id() % t.WARP

        def fetched(piece: Piece, state: RingState) -> RingState:
            begin, end = piece.tiles
            m_tile = t.smaller(piece.first_m_tile + t.smaller(lane, M_TILES - 1), shape.m_tiles - 1)
            inputs = x + piece.row_block.wide() * (shape.across * input_bytes)

            def granule(tile: V) -> V:
                at = m_tile * shape.across + t.smaller(tile, shape.across - 1)
                return t.load_global(offsets + (at << 2).wide())[0]

            def stage(i: V, carry: list[V]) -> list[V]:
                state, tile = RingState(*carry[:2]), begin + i
                following = granule(tile + 1)
                barriers.await_turn(ring.empty(state.stage), state.parity ^ 1)
                at, full = ring.memory + state.stage * stage_bytes, ring.full(state.stage)
                t.when(lane.equals(0), lambda: barriers.expect(full, t.integer(stage_bytes)))
                t.warp_barrier()
                source = stream + carry[2].wide() * shape.granule_bytes
                own = at + lane * tile_bytes
                t.when(lane < M_TILES, lambda: barriers.copy(own, source, tile_bytes, full))
                own_inputs = inputs + tile.wide() * input_bytes
                copied = (at + weight_bytes, own_inputs, input_bytes, full)
                t.when(lane.equals(M_TILES), lambda: barriers.copy(*copied))
                return [*ring.next(state), following]

            return RingState(*t.loop(end - begin, [*state, granule(begin)], stage)[:2])

        def all_of() -> None:
            over_pieces(RingState.first(), fetched)

        t.when((t.thread_id() // t.WARP).equals(THREADS // t.WARP), all_of)

    def multiply(context: Any, scales: Any, y: Any, smem: Any) -> None:
        ring, warp = ring_in(smem), t.thread_id() // t.WARP

        def multiplied(piece: Piece, state: RingState) -> RingState:
            begin, end = piece.tiles

            def stage(_: V, carry: list[V]) -> list[V]:
                state, at = RingState(*carry[:2]), ring.wait(RingState(*carry[:2]))
                where = (at + warp * tile_bytes, at + weight_bytes)
                sums = _multiplied(shape, *where, sixteen_bytes, carry[2:])
                ring.release(state)
                return [*ring.next(state), *sums]

            start = [*state, *[t.number(0)] * (tiling.rows // 2)]
            carry = t.loop(end - begin, start, stage)
            outputs.store(piece, t.address(y), t.address(scales), carry[2:])
            return RingState(*carry[:2])

        over_pieces(RingState.first(), multiplied)

    def body(stream: Any, offsets: Any, x: Any, scales: Any, y: Any, smem: Any) -> None:
        t.emit(make, smem)
        by_role(
            lambda: t.emit(fetch, stream, offsets, x, smem),
            lambda: t.emit(multiply, scales, y, smem),
        )

    kernel = compat.kernel(
        body,
        name="packed_product",
        out_type=jax.ShapeDtypeStruct(outputs.result(shape, tiling.splits), outputs.dtype),
        grid=(blocks,),
        grid_names=("sm",),
        scratch_types=(plgpu.SMEM((stages * (stage_bytes + 16) // 4,), jnp.int32),),
        warpgroups=(THREADS + FETCHERS) // t.WARPGROUP,
    )
    # Jitted, so that it is traced and lowered once for all layers.
    return jax.jit(kernel)


def _multiplied(shape: Shape, weights: V, inputs: V, sixteen_bytes: int, sums: list[V]) -> list[V]:
    """A lane's sums with a stage's products added, of every eight rows in turn."""
    storage, lane = shape.storage, t.thread_id() % t.WARP
    each = max(1, AT_ONCE // storage.spread)
    turns = WARPS // (each * storage.spread)

    def read(at: V, count: int) -> list[V]:
        return t.load_shared(weights + at, count)

    def loaded(turn: int) -> list[list[V]]:
        # A storage asks for a place among eight warps.
        some = range(turn * each, (turn + 1) * each)
        return [storage.load(read, t.integer(n), lane) for n in some]

    later = loaded(0)
    running: list[V] = []
    for turn in range(turns):
        words, later = later, loaded(turn + 1) if turn + 1 < turns else []
        made = [operand for some in words for operand in storage.operands(some)]
        # Registers that products read may not be written before these are done.
        warpgroup.wait(running)
        warpgroup.fence()
        for n, operand in enumerate(made, turn * len(made)):
            sums = warpgroup.multiply(shape.format, operand, inputs + n * sixteen_bytes, sums)
        warpgroup.commit()
        running = [word for operand in made for word in operand]
    warpgroup.wait(running)
    return sums
