"""How one decode step is divided among resident blocks: M-tiles of weights, phase by phase.

A phase is one matrix product. Its matrix is cut into M-tiles of 16 outputs, and each block computes
some M-tiles whole, so that what it writes is final. Only the down projection, whose input is much
longer than its output, is cut along its columns as well: into parts, each the work of some of
the blocks, whose sums are added up afterwards. Which block computes what is a table, so that
every block reads about as many bytes a layer.

A feed-forward that isn't whole tiles is padded in the stream: rows of gate and up and columns of
the down projection that are zero add silu(0) * 0 = 0 to every sum. What is read back is without
them.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.decode_step.packed.storage import Storage
from pallas_kernels.decode_step.packed.storages import STORAGES
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE
from pallas_kernels.decode_step.ptx.formats import Format

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
        return self._matrices(self.ffn)

    @property
    def packed_ffn(self) -> int:
        """`ffn` as the weight stream has it, whole tiles of the down projection's columns; so many
        rows of gate and of up are whole M-tiles, too, of eight of each."""
        return -(-self.ffn // K_TILE) * K_TILE

    @property
    def packed_matrices(self) -> tuple[tuple[int, int], ...]:
        """`matrices` as the weight stream has them."""
        return self._matrices(self.packed_ffn)

    def _matrices(self, ffn: int) -> tuple[tuple[int, int], ...]:
        d, q = self.hidden, self.heads * self.head_dim
        return (self.qkv, d), (d, q), (2 * ffn, d), (d, ffn), (self.vocab, d)


class Stored(NamedTuple):
    """How one layer's matrices are stored, by name in `STORAGES`."""

    q: str
    k: str
    v: str
    o_proj: str
    gate_up: str
    down: str

    def of(self, phase: int) -> tuple[str, ...]:
        """Of the segments of a phase's outputs: queries, keys and values are three."""
        return self[:3] if phase == QKV else (self[phase + 2],)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One matrix product dealt out to blocks.

    What a kernel's body asks for at every stage is worked out once.

    Attributes:
        storages: that its weights have in any layer.
        begins: the first M-tile of each segment, all of which a layer stores alike.
        out, columns: of the matrix as the stream has it, `[out, in]`.
        parts: how many its columns are divided into.
        part: the part each block works on.
        first: the first M-tile of each block.
        count: M-tiles of each block.
    """

    storages: tuple[Storage, ...]
    begins: tuple[int, ...]
    out: int
    columns: int
    parts: int
    part: np.ndarray
    first: np.ndarray
    count: np.ndarray

    @property
    def format(self) -> Format:
        """In which the kernels take its products."""
        format = self.storages[0].format
        assert format is not None, "refused before"
        return format

    @cached_property
    def unit(self) -> int:
        """Tiles that parts have a multiple of, but for the last one."""
        return max(storage.spread for storage in self.storages)

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
        units = -(-self.across // self.unit)
        begins = np.arange(self.parts + 1) * units // self.parts * self.unit
        return np.minimum(begins, self.across)

    @property
    def tiles(self) -> np.ndarray:
        """Tiles in each block's M-tiles."""
        return np.diff(self.part_begin)[self.part]

    @cached_property
    def longest(self) -> int:
        """Tiles in the longest M-tile of any block."""
        return int(np.diff(self.part_begin).max())

    def segment(self, m_tiles: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.begins, m_tiles, side="right") - 1


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
        layers: how each layer's matrices are stored.
        head: how the head is, by name in `STORAGES`.
    """

    shape: ModelShape
    blocks: int
    layers: tuple[Stored, ...]
    head: str

    @classmethod
    def alike(cls, shape: ModelShape, blocks: int, qkv: str, *others: str) -> "StepPlan":
        """Where all layers are stored so: each phase in turn, then the head."""
        *layer, head = others
        return cls(shape, blocks, (Stored(qkv, qkv, qkv, *layer),) * shape.layers, head)

    @classmethod
    def uniform(cls, shape: ModelShape, blocks: int, stored: str) -> "StepPlan":
        """Where all matrices are stored so."""
        return cls.alike(shape, blocks, *[stored] * (HEAD + 1))

    def stored(self, phase: int, layer: int) -> tuple[str, ...]:
        """The names of the storages of a phase's segments in a layer."""
        return (self.head,) if phase == HEAD else self.layers[layer].of(phase)

    @cached_property
    def storages(self) -> tuple[Storage, ...]:
        """All that occur, in the order of `STORAGES`."""
        used = {self.head, *itertools.chain(*self.layers)}
        return tuple(each for name, each in STORAGES.items() if name in used)

    @property
    def granule_bytes(self) -> int:
        return math.gcd(*(storage.tile_bytes for storage in self.storages))

    @cached_property
    def recipes(self) -> tuple[Stored, ...]:
        """The layers' different ways of being stored; without layers that of the head."""
        return tuple(dict.fromkeys(self.layers)) or (Stored(*[self.head] * 6),)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        blocks, shape = self.blocks, self.shape
        made: dict[int, Phase] = {}
        load = np.zeros(blocks)
        for phase in (DOWN, GATE_UP, QKV, O_PROJ, HEAD):
            out, columns = shape.packed_matrices[phase]
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
            names = {self.head}
            if phase != HEAD:
                names = {name for recipe in self.recipes for name in recipe.of(phase)}
            used = tuple(each for each in self.storages if each.name in names)
            begins: tuple[int, ...] = (0,)
            if phase == QKV:
                heads, kv = (n * shape.head_dim // M_TILE for n in (shape.heads, shape.kv_heads))
                begins = (0, heads, heads + kv)
            made[phase] = Phase(used, begins, out, columns, parts, part, first, count)
            layers = self.layers or self.recipes
            stored = [(self.head,)] if phase == HEAD else [layer.of(phase) for layer in layers]
            load = load + np.mean([self._granules(made[phase], each) for each in stored], axis=0)
        return tuple(made[phase] for phase in sorted(made))

    def granules(self, name: str) -> int:
        """Of a tile stored so."""
        return STORAGES[name].tile_bytes // self.granule_bytes

    def _granules(self, phase: Phase, stored: tuple[str, ...]) -> np.ndarray:
        """Of a phase whose segments are stored so, on each block."""
        before = self._before(phase, stored)
        return (before[phase.first + phase.count] - before[phase.first]) * phase.tiles

    def _before(self, phase: Phase, stored: tuple[str, ...]) -> np.ndarray:
        """Granules before each M-tile, were it one tile; and of all at the end."""
        each = np.array([self.granules(name) for name in stored])
        return np.cumsum([0, *each[phase.segment(np.arange(phase.m_tiles))]])

    @cached_property
    def starts(self) -> np.ndarray:
        """The first granule of each layer on each block, then of the head: `[L + 1, blocks]`."""
        of_recipe = {
            recipe: np.sum(
                [self._granules(p, recipe.of(n)) for n, p in enumerate(self.phases[:HEAD])], axis=0
            )
            for recipe in self.recipes
        }
        layers = [of_recipe[layer] for layer in self.layers]
        sizes = [*layers, self._granules(self.phases[HEAD], (self.head,))]
        of_blocks = np.sum(sizes, axis=0)
        inside = np.cumsum(sizes, axis=0) - sizes
        return (np.cumsum(of_blocks) - of_blocks + inside).astype(np.int32)

    @cached_property
    def stream_shape(self) -> tuple[int, int]:
        """Granules, and words of one."""
        head = self._granules(self.phases[HEAD], (self.head,))
        return int((self.starts[-1] + head).max()), self.granule_bytes // 4

    @cached_property
    def tile_offsets(self) -> tuple[np.ndarray, ...]:
        """Where tiles begin: of each phase's in turn an array, then `starts`."""
        return (*map(self._tile_offsets, range(HEAD + 1)), self.starts)

    def at(self, phase: int, layer: int, segment: int | None = None) -> np.ndarray:
        """The first granules of a phase's tiles, or a segment's: `[m_tiles, across]`."""
        found: np.ndarray = self.begin(self.tile_offsets, phase, layer)
        chosen = found if segment is None else found[self.tiles_of(phase, segment)]
        return chosen.reshape(-1, self.phases[phase].across)

    def begin(self, tile_offsets: Sequence[Any], phase: int, layer: int) -> Any:
        """The same of all of a phase's tiles, from `tile_offsets` wherever they lie."""
        owner, *within = tile_offsets[phase]
        if phase == HEAD:
            return tile_offsets[-1][-1][owner] + within[0]
        recipe = self.recipes.index(self.layers[layer])
        return tile_offsets[-1][layer][owner] + within[recipe]

    def tiles_of(self, phase: int, segment: int) -> slice:
        """Which of a phase's tiles are a segment's."""
        this = self.phases[phase]
        ends = (*this.begins, this.m_tiles)[segment : segment + 2]
        return slice(*(m_tile * this.across for m_tile in ends))

    def _tile_offsets(self, phase: int) -> np.ndarray:
        """Of a phase's tiles, M-tile after M-tile: `[1 + recipes, m_tiles * across]`.

        The first row holds each tile's block; then there is one for each recipe, with the tile's
        first granule counted from that of its layer on the block. The head has one.
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
        rows = [block]
        m_tile = np.arange(this.m_tiles)[:, None]
        segment = this.segment(m_tile)
        for recipe in self.recipes if phase != HEAD else (None,):
            stored = recipe.of(phase) if recipe else (self.head,)
            earlier = [
                self._granules(p, recipe.of(n)) for n, p in enumerate(self.phases[:phase]) if recipe
            ]
            begin = sum(earlier, start=np.zeros(self.blocks, int))
            before = self._before(this, stored)
            each = np.array([self.granules(name) for name in stored])[segment]
            tile = (before[m_tile] - before[this.first[block]]) * this.tiles[block]
            rows.append(begin[block] + tile + (column - this.part_begin[part]) * each)
        return np.stack([row.ravel() for row in rows]).astype(np.int32)

    def table(self) -> np.ndarray:
        """What a block needs to know of its own work: int32 `[blocks, 16]`; then of every layer how
        each phase is stored, four numbers a layer.

        First granule; first M-tile and number of M-tiles of each phase; part of the down
        projection, its first column in tiles, and its tiles in an M-tile. A phase's number has
        which of its storages each segment has, four bits each, the first segment's lowest.
        """
        down = self.phases[DOWN]
        columns = [self.starts[0]]
        for phase in self.phases:
            columns += [phase.first, phase.count]
        columns += [down.part, down.part_begin[down.part], down.tiles]
        columns += [np.zeros(self.blocks, int)] * (16 - len(columns))
        kinds = np.zeros((-(-self.shape.layers // 4) * 4, 4), int)
        for layer, stored in enumerate(self.layers):
            for n, phase in enumerate(self.phases[:HEAD]):
                used = [storage.name for storage in phase.storages]
                for segment, name in enumerate(stored.of(n)):
                    kinds[layer, n] |= used.index(name) << 4 * segment
        work = np.stack(columns, axis=1)
        return np.concatenate([work, kinds.reshape(-1, 16)]).astype(np.int32)
