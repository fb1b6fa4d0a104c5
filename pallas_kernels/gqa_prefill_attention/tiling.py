"""How the kernel cuts a call into tiles, and which of the measured ways it takes."""

import dataclasses
import functools

from jax.experimental import pallas as pl

from pallas_kernels.target import HOPPER

ROWS = 64
"""Rows of a tile, fixed by the tensor cores."""

MOST_SPLITS = 16

TYPICAL = 2048
"""Slots that a call is tiled for, unless it has more queries: block tables cover the whole context,
whatever the texts' lengths. Split, a short text costs 6 microseconds more, the second pass; a call
of few rows that is not split costs two to four times as much at 16,384."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call, and the order of its tiles: by position, then by head."""

    rows: int  # B
    steps: int  # T
    heads: int  # N
    kv_heads: int  # K
    capacity: int  # S
    dim: int  # H

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def queries(self) -> int:
        """Positions in a tile."""
        return min(ROWS, self.steps)

    @property
    def tile_heads(self) -> int:
        """Heads in a tile."""
        return ROWS // self.queries

    @property
    def head_tiles(self) -> int:
        """Tiles that hold one position's heads of one group; the last may repeat its last head."""
        return pl.cdiv(self.group, self.tile_heads)

    @property
    def tiles(self) -> int:
        return self.steps // self.queries * self.head_tiles


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut up.

    Attributes:
        consumers: warpgroups of a block of threads, with a tile each.
        block: slots a step takes.
        stages: blocks of keys, and of values, in shared memory.
        rate: TFLOP/s measured on an H200 over 8,192 queries of 8,192 slots.
        splits: blocks of threads that share the slots of a tile.
    """

    consumers: int
    block: int
    stages: int
    rate: int
    splits: int = 1


TILINGS = {
    64: (Tiling(3, block=128, stages=3, rate=429), Tiling(2, block=128, stages=4, rate=381)),
    128: (Tiling(2, block=128, stages=2, rate=587), Tiling(3, block=64, stages=4, rate=605)),
}
"""By head dimension."""


def microseconds(shape: Shape, tiling: Tiling) -> float:
    """A guess at the time of a call of typical rows; good enough to choose a tiling by."""
    blocks = pl.cdiv(shape.tiles, tiling.consumers) * shape.rows * shape.kv_heads * tiling.splits
    slots = pl.cdiv(min(shape.capacity, max(TYPICAL, shape.steps)), tiling.splits)
    flops = tiling.consumers * ROWS * slots * 4 * shape.dim
    processors = HOPPER.multiprocessors
    time = pl.cdiv(blocks, processors) * (2 + flops * processors / tiling.rate / 1e6)
    if tiling.splits > 1:  # a second kernel, and float32 parts written and read at 3 TB/s
        parts = tiling.splits * shape.rows * shape.steps * shape.heads * shape.dim
        time += 5 + 8 * parts / 3e6
    return time


def best_tiling(shape: Shape) -> Tiling:
    choices = (
        dataclasses.replace(tiling, splits=splits)
        for tiling in TILINGS[shape.dim]
        for splits in range(1, MOST_SPLITS + 1)
    )
    return min(choices, key=functools.partial(microseconds, shape))
