"""`gqa_decode_attention` for Hopper: flash attention split over the cache, and a combine.

Where there are texts enough for all multiprocessors none is split, and nothing is left to combine.

A block takes one slice of one row's text for one key/value head, so that a single long row
fills the GPU and all G query heads share each read (flash decoding: Dao et al., 2023). The
grid is fixed by the capacity, but the slices divide a row's actual length: a short text with a
large block table costs what a short text costs. A tile of slots lies in one page, whose number
is read from the table before the copy is started.

Everything is transposed: scores are K q^T [slots, 8] and values V^T P^T [H, 8], with the query
heads in the eight columns of the narrowest wgmma. Rows would have to be padded to 64.

  slots ─► K tile [tile, H] · q^T [H, 8] ─► softmax over rows, 8 columns at once ─► P^T [tile, 8]
           V tile [tile, H]^T · P^T ─► acc [H, 8] ─► partial (acc, maximum, sum) ─► combine
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.target import HOPPER

DTYPES = ("bfloat16", "float16")
DIMS = (64, 128)
COLUMNS = 8
"""Query heads of a key/value head, padded: a wgmma has at least eight columns."""

PAGE = 128
"""Slots of a page divide by this, and so by a tile."""

PART_ROWS = 16
"""Dimensions of the head that one block of the combine takes: 512 contiguous bytes a split."""

WGMMA = plgpu.Layout.WGMMA
PER_COLUMN = WGMMA.reduce(0)
# The combine's [splits, 16, 8]: a warp takes every fourth split, its lanes 512 bytes in a row.
SPLITS = plgpu.Layout.TILED(
    plgpu.Tiling(((4, PART_ROWS, COLUMNS), (4,))),
    warp_dims=(-4,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
# [8, 16], one element a thread: what is left of the above, transposed.
TURNED = plgpu.Layout.TILED(
    plgpu.Tiling(((COLUMNS, PART_ROWS), (2, 1))), warp_dims=(-4,), lane_dims=(-2, -3), vector_dim=-1
)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
        tile: slots a step takes; they divide a page's.
        ring: tiles of K and of V in flight.
        blocks_per_sm: blocks that share a multiprocessor: one waits while the other computes.
        max_splits: slices of a row at most; the combine holds them all in registers.
    """

    tile: int = 64
    ring: int = 3
    blocks_per_sm: int = 2
    max_splits: int = 64

    def __post_init__(self) -> None:
        if self.tile % 64 or not 64 <= self.tile <= 256:
            raise ValueError(f"tile={self.tile} must be 64, 128, 192 or 256")
        if self.ring < 2:
            raise ValueError(f"ring={self.ring} must be at least 2")

    def smem(self, dim: int) -> int:
        """Bytes of shared memory a block needs: the ring, q and P, and what is reserved."""
        ours = 2 * (2 * self.ring * self.tile * dim + COLUMNS * (dim + self.tile))
        return ours + HOPPER.reserved_bytes

    @property
    def room(self) -> int:
        """Bytes of shared memory a block may have."""
        return HOPPER.shared_bytes // self.blocks_per_sm

    def splits(self, groups: int, capacity: int) -> int:
        """Slices of each of the `groups` = B * K texts: as many as keep every SM busy."""
        wanted = max(1, HOPPER.multiprocessors * self.blocks_per_sm // groups)
        return min(wanted, pl.cdiv(capacity, self.tile), self.max_splits)


def default_config(dim: int) -> Config:
    return Config(tile=128 * 64 // dim)


def refusal(heads: int, kv_heads: int, page: int, dim: int, *dtypes: jnp.dtype) -> str | None:
    """Why the kernel can't serve these heads and pages of so many slots, or None where it can."""
    if len(set(dtypes)) > 1 or dtypes[0].name not in DTYPES:
        names = ", ".join(dtype.name for dtype in dtypes)
        return f"its kernel takes q and pages both in {' or both in '.join(DTYPES)}, not {names}"
    if dim not in DIMS:
        return f"its kernel takes a head dimension of {DIMS[0]} or {DIMS[1]}, not {dim}"
    if heads // kv_heads > COLUMNS:
        group = heads // kv_heads
        return f"its kernel takes up to {COLUMNS} query heads a key/value head, not {group}"
    if page % PAGE:
        return f"its kernel takes pages of a multiple of {PAGE} slots, not {page}"
    return None


# Jitted so that the layers of a model share one lowering of it, a quarter of a second.
@functools.partial(jax.jit, static_argnames="config")
def gqa_decode_attention(
    q: Float[Array, "B N H"],
    pages: Float[Array, "P K C H"],
    k_tables: Int[Array, "B n"],
    v_tables: Int[Array, "B n"],
    lengths: Int[Array, "B"],
    config: Config | None = None,
) -> Float[Array, "B N H"]:
    batch, entries = k_tables.shape
    kv_heads, page, dim = pages.shape[1:]
    group = q.shape[1] // kv_heads
    config = config or default_config(dim)
    if page % config.tile:
        raise ValueError(f"{config}'s tile doesn't divide a page of {page} slots")
    if config.smem(dim) > config.room:
        raise ValueError(f"{config} needs {config.smem(dim)} bytes of shared memory a block")
    grouped = q.reshape(batch, kv_heads, group, dim)
    splits = config.splits(batch * kv_heads, entries * page)
    whole, padded = splits == 1, pl.cdiv(splits, 4) * 4
    tiling = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    ring = (config.ring, config.tile, dim)
    f32 = jnp.float32

    result = jax.ShapeDtypeStruct(grouped.shape, q.dtype)
    parts = (
        jax.ShapeDtypeStruct((batch, kv_heads, padded, dim, COLUMNS), f32),
        jax.ShapeDtypeStruct((batch, kv_heads, 2, padded, COLUMNS), f32),
    )
    found = compat.kernel(
        functools.partial(_attend, config=config, whole=whole),
        name="gqa_decode_attention",
        out_type=(result,) if whole else parts,
        grid=(splits, kv_heads, batch),
        grid_names=("split", "kv_head", "row"),
        scratch_types=[
            plgpu.SMEM((COLUMNS, dim), q.dtype, transforms=tiling),
            plgpu.SMEM(ring, q.dtype, transforms=tiling),
            plgpu.SMEM(ring, q.dtype, transforms=tiling),
            plgpu.SMEM((COLUMNS, config.tile), q.dtype, transforms=tiling),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=config.ring),
            plgpu.Barrier(num_barriers=config.ring),
        ],
        approx_math=True,
    )(*(x.astype(jnp.int32) for x in (lengths, k_tables, v_tables)), grouped, pages)
    if whole:
        return found[0].reshape(q.shape)

    out = compat.kernel(
        functools.partial(_combine, splits=splits),
        name="gqa_decode_attention_combine",
        out_type=result,
        grid=(dim // PART_ROWS, kv_heads, batch),
        grid_names=("part", "kv_head", "row"),
        scratch_types=[
            plgpu.SMEM((PART_ROWS, COLUMNS), f32),
            plgpu.SMEM((COLUMNS, PART_ROWS), q.dtype),
        ],
        approx_math=True,
    )(*found)
    return out.reshape(q.shape)


def _attend(
    lengths: Any,
    k_tables: Any,
    v_tables: Any,
    q: Any,
    pages: Any,
    *outputs_and_scratch: Any,
    config: Config,
    whole: bool,
) -> None:
    """Block (split, kv_head, row): attention over its slice of the row.

    Writes acc [H, 8], not yet divided by its sum, and for each column the maximum, in units of
    log 2, and the sum. An empty slice has maximum -inf and leaves the rest as it is. Where the
    slice is the whole row it writes the result, of a row of no length zeros.
    """
    *outputs, q_smem, k_ring, v_ring, p_smem, q_full, k_full, v_full = outputs_and_scratch
    split, head, row = (lax.axis_index(name) for name in ("split", "kv_head", "row"))
    page, dim = pages.shape[2:]
    tile, ring = config.tile, config.ring
    length = jnp.minimum(lengths[row], k_tables.shape[1] * page)
    tiles, splits = pl.cdiv(length, tile), lax.axis_size("split")
    first = lax.div(split * tiles, splits)
    count = lax.div((split + 1) * tiles, splits) - first
    nothing = _full((COLUMNS,), -jnp.inf, PER_COLUMN)

    def fetch(i: Any) -> None:
        # Only for tiles that hold a part of the text: their entries are pages.
        slot, start = lax.rem(i, ring), (first + i) * tile
        entry, rows = lax.div(start, page), pl.ds(lax.rem(start, page), tile)
        k, v = k_tables[row, entry], v_tables[row, entry]
        plgpu.copy_gmem_to_smem(pages.at[k, head, rows], k_ring.at[slot], k_full.at[slot])
        plgpu.copy_gmem_to_smem(pages.at[v, head, rows], v_ring.at[slot], v_full.at[slot])

    def step(i: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        top, total, acc = carry
        slot, left = lax.rem(i, ring), length - (first + i) * tile
        plgpu.barrier_wait(k_full.at[slot])

        def multiply_keys(ref: Any) -> Any:
            plgpu.wgmma(ref, k_ring.at[slot], q_smem.T)
            return ref[...]

        scores = pl.run_scoped(multiply_keys, plgpu.ACC((tile, COLUMNS), jnp.float32))
        # A slot past the length may hold NaN, and so may its score.
        valid = plgpu.broadcasted_iota(jnp.int32, (tile, COLUMNS), 0, layout=WGMMA) < left
        scores = jnp.where(valid, scores * (dim**-0.5 * math.log2(math.e)), -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=0))  # finite: a tile has a valid slot
        scale = jnp.exp2(top - new_top)
        p = jnp.exp2(scores - _rows(new_top, tile))
        p_smem.T[...] = plgpu.layout_cast(p.astype(p_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.barrier_wait(v_full.at[slot])
        pl.when(left < tile)(lambda: _zero_rows(v_ring.at[slot], left))
        # P is seen by the wgmma below, and every warp is done with the tile before this one.
        plgpu.commit_smem()
        pl.when(i + ring - 1 < count)(lambda: fetch(i + ring - 1))

        def multiply_values(ref: Any) -> None:
            plgpu.wgmma(ref, v_ring.at[slot].T, p_smem.T)

        acc = pl.run_state(multiply_values)(plgpu.ACC.init(acc * _rows(scale, dim)))
        # Summed over the tile's rows only at the end: each thread keeps its own part.
        return new_top, total * _rows(scale, tile) + p, acc

    def attended() -> tuple[Any, Any, Any]:
        # A box of eight rows over the G there are: the copy fills the others with zeros.
        plgpu.copy_gmem_to_smem(q.at[row, head, pl.ds(0 * split, COLUMNS)], q_smem, q_full)
        for i in range(ring - 1):
            pl.when(i < count)(functools.partial(fetch, i))
        plgpu.barrier_wait(q_full)
        start = nothing, _full((tile, COLUMNS), 0, WGMMA), _full((dim, COLUMNS), 0, WGMMA)
        top, total, acc = lax.fori_loop(0, count, step, start)
        return top, total.sum(axis=0), acc

    if whole:
        _, total, acc = attended()
        total = _rows(total, dim)
        values = jnp.where(total > 0, acc / total, 0.0).astype(q.dtype)
        # The queries are done with. Of eight rows the copy writes the G there are.
        q_smem.T[...] = plgpu.layout_cast(values, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem, outputs[0].at[row, head, pl.ds(0 * split, COLUMNS)])
        plgpu.wait_smem_to_gmem(0)
        return

    acc_out, stats_out = outputs

    @pl.when(count == 0)
    def write_nothing() -> None:
        compat.store_few(stats_out.at[row, head, 0, split], nothing)

    @pl.when(count > 0)
    def write_part() -> None:
        top, total, acc = attended()
        compat.store_few(stats_out.at[row, head, 0, split], top)
        compat.store_few(stats_out.at[row, head, 1, split], total)
        acc_out[row, head, split] = acc


def _combine(acc: Any, stats: Any, out: Any, turn: Any, out_smem: Any, *, splits: int) -> None:
    """Block (part, kv_head, row): 16 dimensions of all G heads from the splits' partials.

    With the maxima m, sums l and values a of the splits, out = sum(2^(m - M) a) / sum(2^(m - M) l)
    with M = max(m). A split without work, or with nothing but padding, has weight 0 and may
    hold anything.
    """
    part, head, row = (lax.axis_index(name) for name in ("part", "kv_head", "row"))
    padded = acc.shape[2]
    per_split = SPLITS.reduce(1)  # [splits, 8]
    rows = pl.ds(part * PART_ROWS, PART_ROWS)

    def spread(x: Any, axes: tuple[int, ...], shape: tuple[int, ...], layout: Any) -> Any:
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, axes), layout)

    top, total = (
        compat.load(stats.at[row, head, i], layout=per_split, optimized=False) for i in range(2)
    )
    values = compat.load(acc.at[row, head, :, rows], layout=SPLITS, optimized=False)
    real = plgpu.broadcasted_iota(jnp.int32, (padded, COLUMNS), 0, layout=per_split) < splits
    top = jnp.where(real, top, -jnp.inf)
    weight = jnp.exp2(top - spread(top.max(axis=0), (1,), top.shape, per_split))
    total = jnp.where(weight > 0, weight * total, 0.0).sum(axis=0)
    weight = spread(
        weight / spread(total, (1,), top.shape, per_split), (0, 2), values.shape, SPLITS
    )
    turn[...] = jnp.where(weight > 0, weight * values, 0.0).sum(axis=0)
    plgpu.commit_smem()
    out_smem[...] = compat.load(turn.T, layout=TURNED, optimized=False).astype(out.dtype)
    plgpu.commit_smem()
    # Eight rows again, of which the copy writes the G there are.
    plgpu.copy_smem_to_gmem(out_smem, out.at[row, head, pl.ds(0 * part, COLUMNS), rows])
    plgpu.wait_smem_to_gmem(0)


def _full(shape: tuple[int, ...], value: float, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _rows(x: Any, rows: int) -> Any:
    """[8] -> [rows, 8], every row the same."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (rows, COLUMNS), (1,)), WGMMA)


def _zero_rows(tile: Any, left: Any) -> None:
    """Zeroes the rows of a V tile from `left` on: 0 * NaN is NaN."""
    rows, dim = tile.shape
    for start in range(0, rows, 64):
        part = tile.at[pl.ds(start, 64)]
        values = compat.load(part, layout=WGMMA)
        slots = start + plgpu.broadcasted_iota(jnp.int32, (64, dim), 0, layout=WGMMA)
        part[...] = jnp.where(slots < left, values, jnp.zeros_like(values))
