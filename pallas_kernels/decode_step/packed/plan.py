"""How one decode step is divided among resident blocks: M-tiles of weights, phase by phase.

A phase is one matrix product. Its matrix is cut into M-tiles of 16 outputs, and each block computes
some M-tiles whole, so that what it writes is final. Only the down projection, whose input is much
longer than its output, is cut along its columns as well: into parts, each the work of some of
the blocks, whose sums are added up afterwards. Which block computes what is a table, so that
every block reads about as many bytes a layer.
"""

import dataclasses
import math
from functools import cached_property

import numpy as np

from pallas_kernels.decode_step.packed.storage import Storage
from pallas_kernels.decode_step.packed.storages import STORAGES
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE
from pallas_kernels.decode_step.ptx.formats import Format

LONGEST_STAGE = 4
"""Tiles that are fetched at once, at most."""

QKV, O_PROJ, GATE_UP, DOWN, HEAD = range(5)
"""The phases: four products a layer, then the head."""

LONGEST_PART = 20
"""Tiles in an M-tile of a part, unless the hidden state or `MOST_PARTS` parts are longer."""
MOST_PARTS = 8


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder: L layers, D hidden, N and K heads, H head dimension, F, V."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    eps: float

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of QKV, output, gate and up, and down projection; then the head."""
        d, q = self.hidden, self.heads * self.head_dim
        return (self.qkv, d), (d, q), (2 * self.ffn, d), (d, self.ffn), (self.vocab, d)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One matrix product dealt out to blocks.

    Attributes:
        storage: how its weights are stored.
        granules: of the stream, in a tile.
        out, columns: of the matrix, `[out, in]`.
        parts: how many its columns are divided into.
        part: the part each block works on.
        first: the first M-tile of each block.
        count: M-tiles of each block.
    """

    storage: Storage
    granules: int
    out: int
    columns: int
    parts: int
    part: np.ndarray
    first: np.ndarray
    count: np.ndarray

    @property
    def format(self) -> Format:
        """In which the kernels take its products."""
        assert self.storage.format is not None, "refused before"
        return self.storage.format

    @property
    def m_tiles(self) -> int:
        return self.out // M_TILE

    @property
    def across(self) -> int:
        """Tiles in a whole M-tile."""
        return self.columns // K_TILE

    @property
    def part_begin(self) -> np.ndarray:
        """The first column, in tiles, of every part; and their number at the end."""
        return np.arange(self.parts + 1) * self.across // self.parts

    @property
    def tiles(self) -> np.ndarray:
        """Tiles in each block's M-tiles."""
        return np.diff(self.part_begin)[self.part]

    @property
    def stream(self) -> np.ndarray:
        """Granules of each block's M-tiles."""
        return self.count * self.tiles * self.granules

    @property
    def longest(self) -> int:
        """Tiles in the longest M-tile of any block."""
        return int(np.diff(self.part_begin).max())

    @property
    def stages(self) -> int:
        """Stages of the ring that an M-tile fills; that i of n tiles begins at n i / stages."""
        return -(-self.longest // LONGEST_STAGE)

    @property
    def stage_tiles(self) -> int:
        """Tiles in the longest stage."""
        return -(-self.longest // self.stages)


def alike(storage: str) -> tuple[str, ...]:
    """Every phase in the storage of that name, as `StepPlan.stored` has it."""
    return (storage,) * (HEAD + 1)


def _dealt(m_tiles: int, load: np.ndarray) -> np.ndarray:
    """How many of the M-tiles each block gets; those with the least load one more than others."""
    each, more = divmod(m_tiles, len(load))
    count = np.full(len(load), each)
    count[np.argsort(load, kind="stable")[:more]] += 1
    return count


def _parts(out: int, columns: int, hidden: int, blocks: int) -> int:
    """Into how many parts the columns are best cut.

    Few tiles for the busiest block come first, then a short input: reading a tile's columns
    of it takes a fourth of what a tile of weights takes.
    """
    across, m_tiles = columns // K_TILE, out // M_TILE
    longest = max(hidden // K_TILE, LONGEST_PART)

    def cost(parts: int) -> float:
        tiles = -(-across // parts)
        return -(-m_tiles // (blocks // parts)) * tiles + tiles / 4

    possible = range(1, min(MOST_PARTS, across, blocks) + 1)
    short = [n for n in possible if -(-across // n) <= longest]
    return min(short or possible[-1:], key=cost)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The phases of a step on `blocks` blocks, and where their tiles lie in the weight stream.

    The stream holds every block's tiles in the order it reads them: its M-tiles of each phase of
    layer 0, of layer 1 and so on, then its M-tiles of the head; block after block. It is counted in
    granules, of which the tiles of every phase are whole ones: where all are stored alike, a
    granule is a tile.

    Attributes:
        stored: the storage of each phase's matrices, by its name in `STORAGES`.
    """

    shape: ModelShape
    blocks: int
    stored: tuple[str, ...]

    @property
    def granule_bytes(self) -> int:
        return math.gcd(*(STORAGES[name].tile_bytes for name in self.stored))

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        blocks, shape = self.blocks, self.shape
        made: dict[int, Phase] = {}
        load = np.zeros(blocks, int)
        for phase in (DOWN, GATE_UP, QKV, O_PROJ, HEAD):
            out, columns = shape.matrices[phase]
            parts = _parts(out, columns, shape.hidden, blocks) if phase == DOWN else 1
            part, count = np.arange(blocks) % parts, np.zeros(blocks, int)
            first = np.zeros(blocks, int)
            for this in range(parts):
                # As many blocks for each part; the few left over have no M-tiles of it.
                mine = np.arange(this, blocks // parts * parts, parts)
                if phase == HEAD:
                    # A block that no layer makes wait would take the words of an early layer,
                    # or none, for the last one's.
                    mine = np.flatnonzero(load)
                count[mine] = _dealt(out // M_TILE, load[mine])
                first[mine] = np.cumsum(count[mine]) - count[mine]
            storage = STORAGES[self.stored[phase]]
            granules = storage.tile_bytes // self.granule_bytes
            made[phase] = Phase(storage, granules, out, columns, parts, part, first, count)
            load = load + made[phase].stream
        return tuple(made[phase] for phase in sorted(made))

    @cached_property
    def _layer_stream(self) -> np.ndarray:
        """Granules of a layer on each block."""
        return np.sum([p.stream for p in self.phases[:HEAD]], axis=0)

    @cached_property
    def first_granule(self) -> np.ndarray:
        """Of each block, in the stream; and the number of all at the end."""
        stream = self.shape.layers * self._layer_stream + self.phases[HEAD].stream
        return np.concatenate([[0], np.cumsum(stream)])

    @property
    def stream_shape(self) -> tuple[int, int]:
        """Granules, and words of one."""
        return int(self.first_granule[-1]), self.granule_bytes // 4

    def tile_offsets(self, phase: int) -> np.ndarray:
        """Where in the stream a phase's tiles begin, M-tile after M-tile: `[2, m_tiles * across]`.

        The first row holds each tile's first granule in layer 0, the second how much further it
        lies in every layer after.
        """
        this = self.phases[phase]
        column = np.arange(this.across)
        part = np.searchsorted(this.part_begin, column, side="right") - 1
        owner = np.zeros((this.parts, this.m_tiles), int)
        for number, (this_part, begin, count) in enumerate(
            zip(this.part, this.first, this.count, strict=True)
        ):
            owner[this_part, begin : begin + count] = number
        block = owner[part].T  # [m_tiles, across]
        layer = self._layer_stream
        earlier = [p.stream for p in self.phases[:phase]]
        before = sum(earlier, start=np.zeros_like(layer))
        if phase == HEAD:
            before = self.shape.layers * layer
        m_tile = np.arange(this.m_tiles)[:, None] - this.first[block]
        start = self.first_granule[block] + before[block]
        tile = m_tile * this.tiles[block] + column - this.part_begin[part]
        at = start + tile * this.granules
        return np.stack([at.ravel(), layer[block].ravel()]).astype(np.int32)

    def table(self) -> np.ndarray:
        """What a block needs to know of its own work: int32 `[blocks, 16]`.

        First granule; first M-tile and number of M-tiles of each phase; part of the down
        projection, its first column in tiles, and its tiles in an M-tile.
        """
        down = self.phases[DOWN]
        columns = [self.first_granule[:-1]]
        for phase in self.phases:
            columns += [phase.first, phase.count]
        columns += [down.part, down.part_begin[down.part], down.tiles]
        columns += [np.zeros(self.blocks, int)] * (16 - len(columns))
        return np.stack(columns, axis=1).astype(np.int32)
