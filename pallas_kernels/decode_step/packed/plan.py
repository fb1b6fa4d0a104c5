"""How one decode step is divided among resident blocks: bands of weights, phase by phase.

A phase is one matrix product. Its matrix is cut into bands of 16 rows, and each block computes
some bands whole, so that what it writes is final. Only the down projection, whose input is much
longer than its output, is cut along its columns as well: into parts, each the work of some of
the blocks, whose sums are added up afterwards. Which block computes what is a table, so that
every block reads about as many bytes a layer.
"""

import dataclasses
from functools import cached_property

import numpy as np

BAND = 16
"""Rows of a band: those of one tensor-core product."""
COLUMNS = 128
"""Of a tile: eight warps take 16 each. A tile of 16 rows is 4 KiB in 16 bits."""
LONGEST_PAGE = 4
"""Tiles that are fetched at once, at most."""

QKV, OUTPUT, GATE_UP, DOWN, HEAD = range(5)
"""The phases: four products a layer, then the head."""

LONGEST_PART = 20
"""Tiles in a band of a part, unless the hidden state or `MOST_PARTS` parts are longer."""
MOST_PARTS = 8


@dataclasses.dataclass(frozen=True)
class Shape:
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
        """(rows, columns) of QKV, output, gate and up, and down projection; then the head."""
        d, q = self.hidden, self.heads * self.head_dim
        return (self.qkv, d), (d, q), (2 * self.ffn, d), (d, self.ffn), (self.vocab, d)


@dataclasses.dataclass(frozen=True)
class Phase:
    """One matrix product dealt out to blocks.

    Attributes:
        rows, columns: of the matrix.
        parts: how many its columns are divided into.
        part: the part each block works on.
        first: the first band of each block.
        count: bands of each block.
    """

    rows: int
    columns: int
    parts: int
    part: np.ndarray
    first: np.ndarray
    count: np.ndarray

    @property
    def bands(self) -> int:
        return self.rows // BAND

    @property
    def across(self) -> int:
        """Tiles in a whole band."""
        return self.columns // COLUMNS

    @property
    def begin(self) -> np.ndarray:
        """The first column, in tiles, of every part; and their number at the end."""
        return np.arange(self.parts + 1) * self.across // self.parts

    @property
    def tiles(self) -> np.ndarray:
        """Tiles in each block's bands."""
        return np.diff(self.begin)[self.part]

    @property
    def longest(self) -> int:
        """Tiles in the longest band of any block."""
        return int(np.diff(self.begin).max())

    @property
    def pages(self) -> int:
        """How many pages a band is fetched in; page i of n tiles begins at n i / pages."""
        return -(-self.longest // LONGEST_PAGE)

    @property
    def page_tiles(self) -> int:
        """Tiles in the longest page."""
        return -(-self.longest // self.pages)


def _dealt(bands: int, load: np.ndarray) -> np.ndarray:
    """How many of `bands` each block gets; those with the least load one more than the others."""
    each, more = divmod(bands, len(load))
    count = np.full(len(load), each)
    count[np.argsort(load, kind="stable")[:more]] += 1
    return count


def _parts(rows: int, columns: int, hidden: int, blocks: int) -> int:
    """Into how many parts the columns are best cut.

    Few tiles for the busiest block come first, then a short input: reading a tile's columns
    of it takes a fourth of what a tile of weights takes.
    """
    across, bands = columns // COLUMNS, rows // BAND
    longest = max(hidden // COLUMNS, LONGEST_PART)

    def cost(parts: int) -> float:
        tiles = -(-across // parts)
        return -(-bands // (blocks // parts)) * tiles + tiles / 4

    possible = range(1, min(MOST_PARTS, across, blocks) + 1)
    short = [n for n in possible if -(-across // n) <= longest]
    return min(short or possible[-1:], key=cost)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The phases of a step on `blocks` blocks, and where their tiles lie on the tape.

    The tape holds every block's tiles in the order it reads them: its bands of each phase of
    layer 0, of layer 1 and so on, then its bands of the head; block after block.
    """

    shape: Shape
    blocks: int

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        blocks, shape = self.blocks, self.shape
        made: dict[int, Phase] = {}
        load = np.zeros(blocks, int)
        for phase in (DOWN, GATE_UP, QKV, OUTPUT, HEAD):
            rows, columns = shape.matrices[phase]
            parts = _parts(rows, columns, shape.hidden, blocks) if phase == DOWN else 1
            part, count = np.arange(blocks) % parts, np.zeros(blocks, int)
            first = np.zeros(blocks, int)
            for this in range(parts):
                # As many blocks for each part; the few left over have no bands of it.
                mine = np.arange(this, blocks // parts * parts, parts)
                if phase == HEAD:
                    # A block that no layer makes wait would take the words of an early layer,
                    # or none, for the last one's.
                    mine = np.flatnonzero(load)
                count[mine] = _dealt(rows // BAND, load[mine])
                first[mine] = np.cumsum(count[mine]) - count[mine]
            made[phase] = Phase(rows, columns, parts, part, first, count)
            load = load + count * made[phase].tiles
        return tuple(made[phase] for phase in sorted(made))

    @cached_property
    def _layer_tiles(self) -> np.ndarray:
        """Tiles of a layer on each block."""
        layer = self.phases[:HEAD]
        return np.sum([p.count * p.tiles for p in layer], axis=0)

    @cached_property
    def first_tile(self) -> np.ndarray:
        """Of each block, on the tape; and the number of all at the end."""
        head = self.phases[HEAD]
        tiles = self.shape.layers * self._layer_tiles + head.count * head.tiles
        return np.concatenate([[0], np.cumsum(tiles)])

    @property
    def tape_tiles(self) -> int:
        return int(self.first_tile[-1])

    def places(self, phase: int) -> np.ndarray:
        """Where on the tape a phase's tiles lie, band after band: `[2, bands * across]`.

        The first row holds each tile's place in layer 0, the second how much further it lies
        in every layer after.
        """
        this = self.phases[phase]
        column = np.arange(this.across)
        part = np.searchsorted(this.begin, column, side="right") - 1
        owner = np.zeros((this.parts, this.bands), int)
        for number, (this_part, begin, count) in enumerate(
            zip(this.part, this.first, this.count, strict=True)
        ):
            owner[this_part, begin : begin + count] = number
        block = owner[part].T  # [bands, across]
        layer = self._layer_tiles
        earlier = [p.count * p.tiles for p in self.phases[:phase]]
        before = sum(earlier, start=np.zeros_like(layer))
        if phase == HEAD:
            before = self.shape.layers * layer
        band = np.arange(this.bands)[:, None] - this.first[block]
        start = self.first_tile[block] + before[block]
        at = start + band * this.tiles[block] + column - this.begin[part]
        return np.stack([at.ravel(), layer[block].ravel()]).astype(np.int32)

    def table(self) -> np.ndarray:
        """What a block needs to know of its own work: int32 `[blocks, 16]`.

        First tile; first band and number of bands of each phase; part of the down projection,
        its first column in tiles, and its tiles in a band.
        """
        down = self.phases[DOWN]
        columns = [self.first_tile[:-1]]
        for phase in self.phases:
            columns += [phase.first, phase.count]
        columns += [down.part, down.begin[down.part], down.tiles]
        columns += [np.zeros(self.blocks, int)] * (16 - len(columns))
        return np.stack(columns, axis=1).astype(np.int32)
