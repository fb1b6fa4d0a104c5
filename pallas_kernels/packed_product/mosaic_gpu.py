"""A product of many rows with weights of the stream, on Hopper.

Weights are the first operand of a warpgroup's products, which lanes load as they lie in the stream
and make numbers of in registers; x is the second, in shared memory. Two warpgroups have half of a
piece's M-tiles each, so that one makes operands while the other's products run; a warp of a third
one fetches ahead, across pieces.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.decode_step.common.launch import FETCHERS, SHARED_BYTES, THREADS, by_role
from pallas_kernels.decode_step.common.ring import Ring, RingState
from pallas_kernels.decode_step.packed.packing import Packed
from pallas_kernels.decode_step.packed.plan import GATE_UP, StepPlan
from pallas_kernels.decode_step.packed.storage import Storage
from pallas_kernels.decode_step.packed.storages import STORAGES
from pallas_kernels.decode_step.packed.tile import M_TILE, WARPS
from pallas_kernels.decode_step.ptx import barriers, warpgroup
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import FORMATS, Format
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.lazy import lazy
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


def product(
    packed: Packed,
    plan: StepPlan,
    phase: int,
    layer: int,
    x: Float[Array, "rows in"],
    dtype: jnp.dtype,
) -> Float[Array, "rows out"]:
    """As `packed_product` has it, of x in `input_dtype`."""
    this, names = plan.phases[phase], plan.stored(phase, layer)
    begin = plan.begin(packed.tile_offsets, phase, layer)
    arranged: dict[int, Array] = {}

    def made(name: str, at: Int[Array, " tiles"]) -> Float[Array, "rows out"]:
        m_tiles, rows = len(at) // this.across, x.shape[0]
        tiling = Tiling.of(m_tiles, this.across, rows, plan.blocks)
        if tiling.rows not in arranged:
            arranged[tiling.rows] = _arranged(x, tiling.rows)
        halves_apart = phase == GATE_UP
        shape = Shape(name, m_tiles, this.across, rows, halves_apart, plan.granule_bytes)
        result = dtype.name if tiling.splits == 1 else "float32"
        found = _build(shape, tiling, plan.blocks, result)(packed.stream, at, arranged[tiling.rows])
        return found[0] if tiling.splits == 1 else found.sum(axis=0).astype(dtype)

    if len({*names}) == 1:
        return made(names[0], begin)
    segments = [begin[plan.tiles_of(phase, n)] for n in range(len(names))]
    both = zip(names, segments, strict=True)
    return jnp.concatenate([made(*each) for each in both], axis=1)


def _arranged(x: Float[Array, "rows in"], each: int) -> Float[Array, "blocks numbers"]:
    """x as products take it, of so many rows a block: `many_rows.inputs` says in which order."""
    rows, columns = x.shape
    blocks = -(-rows // each)
    padded = jnp.pad(x, ((0, blocks * each - rows), (0, 0)))
    # [block, eight, row, sixteen, t, half, e]
    grid = padded.reshape(blocks, each // 8, 8, columns // 16, 4, 2, 2)
    return grid.transpose(0, 3, 1, 5, 2, 4, 6).reshape(blocks, -1)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a product.

    Attributes:
        stored: the weights' storage.
        m_tiles: of them, of `across` tiles each.
        rows: of the other operand.
        halves_apart: whether an M-tile holds outputs of both halves.
        granule_bytes: of the stream.
    """

    stored: str
    m_tiles: int
    across: int
    rows: int
    halves_apart: bool
    granule_bytes: int

    @property
    def storage(self) -> Storage:
        return STORAGES[self.stored]

    @property
    def format(self) -> Format:
        format = self.storage.format
        assert format is not None, "refused before"
        return format

    @property
    def outs(self) -> int:
        return self.m_tiles * M_TILE


@dataclasses.dataclass(frozen=True)
class Piece:
    """One of a product's pieces of work, by its number.

    Blocks that work side by side have the same weights, which they then read from the memory once.
    """

    shape: Shape
    tiling: Tiling
    number: V

    @property
    def row_block(self) -> V:
        return self.number % self.tiling.row_blocks(self.shape.rows)

    @property
    def _rest(self) -> V:
        return self.number // self.tiling.row_blocks(self.shape.rows)

    @property
    def split(self) -> V:
        return self._rest % self.tiling.splits

    @property
    def first_m_tile(self) -> V:
        return self._rest // self.tiling.splits * M_TILES

    @property
    def tiles(self) -> tuple[V, V]:
        """The first of an M-tile's tiles, and the one after the last."""
        splits, across = self.tiling.splits, self.shape.across
        begin, end = (self.split + n for n in (0, 1))
        return begin * across // splits, end * across // splits


@functools.cache
def _build(shape: Shape, tiling: Tiling, blocks: int, dtype: str) -> Callable[..., Any]:
    """A kernel of (weight stream, tiles' first granules, arranged x) to `[splits, rows, out]`."""
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

    def multiply(context: Any, y: Any, smem: Any) -> None:
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
            _store(piece, t.address(y), dtype, carry[2:])
            return RingState(*carry[:2])

        over_pieces(RingState.first(), multiplied)

    def body(stream: Any, offsets: Any, x: Any, y: Any, smem: Any) -> None:
        t.emit(make, smem)
        by_role(lambda: t.emit(fetch, stream, offsets, x, smem), lambda: t.emit(multiply, y, smem))

    kernel = compat.kernel(
        body,
        name="packed_product",
        out_type=jax.ShapeDtypeStruct((tiling.splits, shape.rows, shape.outs), dtype),
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


def _store(piece: Piece, y: V, dtype: str, sums: list[V]) -> None:
    """Writes a warp's M-tile of a piece's rows."""
    shape, tiling = piece.shape, piece.tiling
    lane = t.thread_id() % t.WARP
    g, two, m_tile = lane // 4, lane % 4 * 2, piece.first_m_tile + t.thread_id() // t.WARP
    height, apart = (8, shape.outs // 2) if shape.halves_apart else (M_TILE, 8)
    rounded, size = dtype in FORMATS, 2 if dtype in FORMATS else 4
    # Two outputs of row g once transposed, or output g of two rows.
    first, column = piece.row_block * tiling.rows, m_tile * height
    own, column = (first + g, column + two) if rounded else (first + two, column + g)
    row = piece.split * shape.rows + own
    base = y + (row.wide() * shape.outs + column.wide()) * size
    inside = m_tile < shape.m_tiles

    def store(below: int, further: int, value: V) -> None:
        at = base + (below * shape.outs + further) * size
        t.when(inside & (own + below < shape.rows), lambda: t.store_global(at, [value]))

    for eight in range(tiling.rows // 8):
        # Outputs g, g, g + 8 and g + 8 of rows 2 t, 2 t + 1, 2 t and 2 t + 1.
        four = sums[4 * eight : 4 * eight + 4]
        for half in range(2):
            pair = four[2 * half : 2 * half + 2]
            if rounded:
                both = t.transposed(FORMATS[dtype].pair(*pair))
                store(8 * eight, half * apart, both)
            else:
                for n, value in enumerate(pair):
                    store(8 * eight + n, half * apart, value)
