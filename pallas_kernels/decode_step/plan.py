"""How one decode step is divided among resident blocks: tiles of weights, in phases.

Every weight matrix is cut into tiles of 64 rows by 128 columns. A phase is one matrix product;
its tiles, row after row, are dealt out in equal runs, one run to a block. A row of tiles may
so be shared by several blocks; each leaves its part of the sums in a slot of its own, and
whoever reads them next adds the slots up in order. Nothing is added atomically, so the same
inputs give the same bits.
"""

import dataclasses
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import lax

ROWS, COLUMNS = 64, 128
"""Of a tile: 16 KiB in 16 bits."""


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


def _quotient(numerator: Any, denominator: int) -> Any:
    """Of numbers that are not negative, whether known or traced."""
    if isinstance(numerator, jax.Array):
        return lax.div(numerator, denominator)
    return numerator // denominator


@dataclasses.dataclass(frozen=True)
class Phase:
    """One matrix product dealt out to `blocks` blocks."""

    rows: int
    columns: int
    blocks: int

    @property
    def across(self) -> int:
        """Tiles in a row of tiles."""
        return self.columns // COLUMNS

    @property
    def tiles(self) -> int:
        return self.rows // ROWS * self.across

    @property
    def most(self) -> int:
        """The longest run of tiles any block has."""
        return -(-self.tiles // self.blocks)

    def first(self, block: Any) -> Any:
        """The first tile of a block's run; works on traced numbers too."""
        return _quotient(block * self.tiles, self.blocks)

    def owner(self, tile: Any) -> Any:
        """The block whose run a tile is in; works on traced numbers too."""
        return _quotient((tile + 1) * self.blocks - 1, self.tiles)

    def fills(self, slot: Any, row: Any) -> Any:
        """Whether a block leaves anything in this slot of a row of tiles."""
        begin = row * self.across
        block = self.owner(begin) + slot
        return (self.first(block) < begin + self.across) & (
            self.first(block + 1) > self.first(block)
        )

    @cached_property
    def slots(self) -> int:
        """The most blocks that share a row of tiles."""
        first = np.arange(self.rows // ROWS) * self.across
        return int((self.owner(first + self.across - 1) - self.owner(first)).max()) + 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The phases of a step on `blocks` blocks, and where their tiles lie on the tape.

    The tape holds every block's tiles in the order it reads them: its run of each phase of
    layer 0, of layer 1 and so on, then its run of the head; block after block.
    """

    shape: Shape
    blocks: int

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        return tuple(Phase(rows, columns, self.blocks) for rows, columns in self.shape.matrices)

    @cached_property
    def tape_tiles(self) -> int:
        *layer, head = self.phases
        return self.shape.layers * sum(p.tiles for p in layer) + head.tiles

    def places(self, phase: int) -> np.ndarray:
        """Where on the tape a phase's tiles lie (0 to 3 of a layer, 4 the head): `[2, n]`.

        The first row holds each tile's place in layer 0, the second how much further it lies
        in every layer after.
        """
        *in_layer, head = self.phases
        this = self.phases[phase]
        tile = np.arange(this.tiles)
        block = this.owner(tile)
        runs = [p.first(block + 1) - p.first(block) for p in in_layer]
        start = self.shape.layers * sum(p.first(block) for p in in_layer) + head.first(block)
        before = self.shape.layers * sum(runs) if this is head else sum(runs[:phase])
        at = start + before + tile - this.first(block)
        return np.stack([at, np.broadcast_to(sum(runs), at.shape)]).astype(np.int32)
