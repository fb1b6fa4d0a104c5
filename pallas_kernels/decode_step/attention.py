"""The attention of a decode step: a block takes some tiles of slots of one key/value head.

Block b serves head b // splits and every `active_splits`-th tile of its slots. All query heads
of the group sit in the rows of one matrix, so they share each read of the cache. The results of
the splits are combined exactly by whoever reads them.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.decode_step.plan import COLUMNS, ROWS, Plan
from pallas_kernels.decode_step.tagged import totals
from pallas_kernels.decode_step.vectors import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    MATRIX,
    columns_of,
    gmem,
    rounded,
    rows_of,
    strided,
)

SLOT_TILE = 64
"""Cache slots taken at a time."""
TOGETHER = 4
"""Splits whose results are loaded at a time."""
NEVER = -1e30
"""Stands for a score of minus infinity, without its NaN."""

Softmax = tuple[jax.Array, jax.Array, jax.Array]
"""Running maximum (in units of log 2), sum of weights and weighted values."""


@dataclasses.dataclass
class Attention:
    """One block's part in the attention of every layer.

    Attributes:
        splits: blocks that share a key/value head.
        stages: cache tiles in flight.
        position: of the token; the cache holds the slots before it.
        cache, new: of every layer's keys, then of its values: of the text, of the token.
        tiles: of keys, then of values, in flight.
        out, stats: each block's weighted values, and its maximum and sum of weights.
        raw, queries: of the group's heads, in shared memory: as they come, and rotated.
        full: the barrier of each cache tile in flight.
        head, split: what this block serves; `mine` counts its tiles of slots.
        active_splits: splits that have anything to say; `attends`: whether this block has.
    """

    plan: Plan
    splits: int
    stages: int
    block: jax.Array
    position: jax.Array
    bias: Any
    qkv_sum: Any
    rope: Any
    cache: Any
    new: Any
    out: Any
    stats: Any
    raw: Any
    queries: Any
    tiles: tuple[Any, Any]
    full: Any

    def __post_init__(self) -> None:
        self.head, self.split = lax.div(self.block, self.splits), lax.rem(self.block, self.splits)
        tiles = lax.div(self.position + SLOT_TILE - 1, SLOT_TILE)
        self.active_splits = jnp.minimum(_splits_for(tiles), self.splits)
        left = tiles - self.split + self.active_splits - 1
        self.mine = jnp.maximum(lax.div(left, self.active_splits), 0)
        self.attends = (self.head < self.plan.shape.kv_heads) & (self.split < self.active_splits)

    def prefetch(self, layer: jax.Array) -> None:
        """Starts the copies of a layer's first tiles, which don't depend on the step so far."""
        for stage in range(self.stages):
            self._fetch(layer, stage, stage)

    def _fetch(self, layer: jax.Array, j: Any, stage: Any) -> None:
        @pl.when(self.attends & (j < self.mine))
        def _() -> None:
            at = pl.ds((self.split + j * self.active_splits) * SLOT_TILE, SLOT_TILE)
            for tile, index in zip(self.tiles, self._rows_of(layer), strict=True):
                plgpu.copy_gmem_to_smem(
                    self.cache.at[index, self.head, at], tile.at[stage], self.full.at[stage]
                )

    def _rows_of(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where a layer's keys and values are."""
        return layer, self.plan.shape.layers + layer

    def attend(self, layer: jax.Array, tag: jax.Array) -> None:
        """This block's splits of one layer, into `out` and `stats`; split 0 fills `new` too."""
        h = self.plan.shape.head_dim
        keys, value, own = self._token(layer, tag)
        # Split 0 starts from the new token, which is not in the cache yet.
        leads = self.split == 0

        @pl.when(leads)
        def _() -> None:
            of_keys, of_values = self._rows_of(layer)
            for i, part in enumerate(keys):
                self.new[of_keys, pl.ds(self.head * h + i * (h // 2), h // 2)] = part
            self.new[of_values, pl.ds(self.head * h, h)] = value

        maximum = jnp.where(leads, own * self._scale, NEVER)
        weight = plgpu.layout_cast(
            jnp.broadcast_to(jnp.where(leads, 1.0, 0.0), (ROWS,)), ALONG_ROWS
        )
        carry = maximum, weight, jnp.where(leads, columns_of(value), 0.0)
        carry = lax.fori_loop(0, self.mine, lambda j, c: self._tile(layer, j, c), carry)
        self.stats[self.block, 0], self.stats[self.block, 1], self.out[self.block] = carry

    @property
    def _scale(self) -> float:
        return self.plan.shape.head_dim**-0.5 * math.log2(math.e)

    def _token(
        self, layer: jax.Array, tag: jax.Array
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """The token's key (in halves), its value and its own scores; queries go to memory."""
        shape = self.plan.shape
        h, half = shape.head_dim, shape.head_dim // 2
        cos, sin = (gmem(self.rope.at[i], ALONG_COLUMNS) for i in (0, 1))
        at_q = self.head * shape.group * h
        at_k = (shape.heads + self.head) * h
        at_v = at_k + shape.kv_heads * h
        width = -(-shape.group * h // 128) * 128
        # A head of 64 dimensions comes with its neighbour, or with what follows the last.
        runs = [(at_q, width), (at_k, 128), (at_v, 128)]
        biases = [gmem(self.bias.at[layer, pl.ds(at_q, width)], strided(width))]
        biases += [
            gmem(self.bias.at[layer, pl.ds(at, n)], ALONG_COLUMNS)
            for at, n in ((at_k, half), (at_k + half, half), (at_v, h))
        ]
        q, k, v = totals(self.qkv_sum, self.plan.phases[0], runs, tag)
        after = ROWS * h - 256  # rows past the group may hold anything
        self.raw[pl.ds(after, 128)] = k
        self.raw[pl.ds(after + 128, 128)] = v

        def staged(at: int, n: int) -> jax.Array:
            return compat.load(self.raw.at[pl.ds(at, n)], layout=ALONG_COLUMNS)

        first, second = (staged(after + i * half, half) + biases[1 + i] for i in (0, 1))
        value = rounded(staged(after + 128, h) + biases[3])
        keys = [rounded(first * cos - second * sin), rounded(second * cos + first * sin)]
        self.raw[pl.ds(0, width)] = q + biases[0]
        # One head a row; rows past the group hold anything and touch nothing else.
        raw = self.raw.reshape(ROWS, h)
        first, second = (gmem(raw.at[:, pl.ds(i * half, half)], MATRIX) for i in (0, 1))
        c, s = columns_of(cos), columns_of(sin)
        queries = [rounded(first * c - second * s), rounded(second * c + first * s)]
        halves = zip(queries, keys, strict=True)
        own = sum(((a * columns_of(b)).sum(axis=1) for a, b in halves), start=jnp.float32(0))
        for i, part in enumerate(queries):
            self.queries[:, pl.ds(i * half, half)] = part.astype(jnp.bfloat16)
        plgpu.commit_smem()
        return keys, value, own

    def _tile(self, layer: jax.Array, j: jax.Array, carry: Softmax) -> Softmax:
        """Adds a tile of slots to the running softmax (Milakov and Gimelshein, 2018)."""
        maximum, weight, values = carry
        h, position = self.plan.shape.head_dim, self.position
        stage = lax.rem(j, self.stages)
        base = (self.split + j * self.active_splits) * SLOT_TILE
        keys_tile, values_tile = (tile.at[stage] for tile in self.tiles)
        plgpu.barrier_wait(self.full.at[stage])

        @pl.when(base + SLOT_TILE > position)
        def _() -> None:
            # 0 * NaN is NaN: a value past the length must not enter even with weight 0.
            old = compat.load(values_tile, layout=MATRIX)
            index = plgpu.broadcasted_iota(jnp.int32, (SLOT_TILE, h), 0, layout=MATRIX)
            values_tile[...] = jnp.where(base + index < position, old, jnp.zeros_like(old))
            plgpu.commit_smem()

        def scores(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, self.queries, keys_tile.T)
            plgpu.wgmma_wait(0)
            return acc[...]

        logit = pl.run_scoped(scores, plgpu.ACC((ROWS, SLOT_TILE), jnp.float32)) * self._scale
        index = plgpu.broadcasted_iota(jnp.int32, (ROWS, SLOT_TILE), 1, layout=MATRIX)
        logit = jnp.where(base + index < position, logit, NEVER)
        new_maximum = jnp.maximum(maximum, jnp.max(logit, axis=1))
        p = jnp.exp2(logit - rows_of(new_maximum, SLOT_TILE))
        shrink = jnp.exp2(maximum - new_maximum)

        def weighted(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, p.astype(jnp.bfloat16), values_tile)
            plgpu.wgmma_wait(0)
            return acc[...]

        more = pl.run_scoped(weighted, plgpu.ACC((ROWS, h), jnp.float32))
        plgpu.commit_smem()
        self._fetch(layer, j + self.stages, stage)
        return (
            new_maximum,
            weight * shrink + jnp.sum(p, axis=1),
            values * rows_of(shrink, h) + more,
        )

    def combined(self, chunks: list[jax.Array]) -> list[list[jax.Array]]:
        """Some runs of 128 columns of the attention output, head by head: all splits together.

        All loads of a turn are independent of each other, so that they overlap.
        """
        shape = self.plan.shape
        per = COLUMNS // shape.head_dim
        heads = [chunk * per + n for chunk in chunks for n in range(per)]

        def add(turn: jax.Array, carries: list[Softmax]) -> list[Softmax]:
            splits = [turn * TOGETHER + i for i in range(TOGETHER)]
            theirs = [[self._part(head, split) for split in splits] for head in heads]
            return [_merged(*pair) for pair in zip(carries, theirs, strict=True)]

        zero = plgpu.layout_cast(jnp.zeros((shape.head_dim,), jnp.float32), self._out_layout)
        none = (jnp.float32(NEVER), jnp.float32(0), zero)
        turns = lax.div(self.active_splits + TOGETHER - 1, TOGETHER)
        sums = lax.fori_loop(0, turns, add, [none] * len(heads))
        out = [values / weight for _, weight, values in sums]
        return [out[i : i + per] for i in range(0, len(out), per)]

    @property
    def _out_layout(self) -> Any:
        h = self.plan.shape.head_dim
        return strided(h) if h % 128 == 0 else ALONG_COLUMNS

    def _part(self, head: jax.Array, split: jax.Array) -> Softmax:
        """What a split found for a head; nothing where there is no such split."""
        group = self.plan.shape.group
        kv_head, row = lax.div(head, group), lax.rem(head, group)
        there = split < self.active_splits
        block = kv_head * self.splits + jnp.where(there, split, 0)
        return (
            jnp.where(there, self.stats[block, 0, row], NEVER),
            jnp.where(there, self.stats[block, 1, row], 0.0),
            gmem(self.out.at[block, row], self._out_layout),
        )


def _splits_for(tiles: jax.Array) -> jax.Array:
    """How many splits attend to so many tiles of slots.

    A tile costs a split about 1 us and TOGETHER splits cost the combine about 0.75 us, so the
    best number grows with the root of the tiles.
    """
    few = jnp.where(tiles <= 4, jnp.maximum(tiles, 1), 8)
    some = jnp.where(tiles <= 64, 16, 32)
    return jnp.where(tiles <= 256, jnp.where(tiles <= 16, few, some), tiles)


def _merged(carry: Softmax, parts: list[Softmax]) -> Softmax:
    """A running softmax and some more parts of it."""
    maximum, weight, values = carry
    new_maximum = maximum
    for theirs, _, _ in parts:
        new_maximum = jnp.maximum(new_maximum, theirs)
    shrink = jnp.exp2(maximum - new_maximum)
    weight, values = weight * shrink, values * shrink
    for theirs, their_weight, their_values in parts:
        shrink = jnp.exp2(theirs - new_maximum)
        weight, values = weight + their_weight * shrink, values + their_values * shrink
    return new_maximum, weight, values
