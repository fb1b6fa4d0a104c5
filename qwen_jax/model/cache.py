"""The functional key/value cache: an immutable pool of pages, and the block table of some rows.

A page holds the keys, or the values, of `PAGE` consecutive positions of one text in one layer. A
row's table says which page holds which of its positions; rows that begin alike may share pages.
(Kwon et al., 2023, arXiv:2309.06180.)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qwen_jax.config import ModelConfig

HEADS = 2
"""The pool's axis of key/value heads, which a mesh deals out."""

PAGE = 128
"""C, positions of a page: what a turn of the kernels' warps takes."""

NOBODY = 0
"""The page that no text owns: what must not be kept is written there."""

Keys = Float[Array, "B K S H"]
New = Float[Array, "B T K H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys (after rotary embedding) and values of B rows.

    Attributes:
        pages: of every layer's keys, then of every layer's values.
        tables: the page of each row's positions j C .. j C + C - 1; where a row has none, any.
    """

    pages: Float[Array, "2L P K C H"]
    tables: Int[Array, "B n"]

    @classmethod
    def create(
        cls, config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype, page: int = PAGE
    ) -> "Cache":
        """An empty one in which every row has pages of its own for so many positions.

        With a `page` of the whole capacity the reference of attention has a derivative.
        """
        each = -(-capacity // page)
        tables = 1 + jnp.arange(rows * each, dtype=jnp.int32).reshape(rows, each)
        return cls(create_pages(config, 1 + rows * each, dtype, page), tables)

    @property
    def capacity(self) -> int:
        """S, positions that a table reaches."""
        return self.tables.shape[1] * self.pages.shape[3]

    @property
    def flat(self) -> Float[Array, "2LP K C H"]:
        """The pages of all layers in a row, which `layer_tables` point into."""
        return self.pages.reshape(-1, *self.pages.shape[2:])

    def layer_tables(self, i: int) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
        """Where in `flat` a layer's keys and its values are."""
        keys, values = self._firsts(i)
        return self.tables + keys, self.tables + values

    def _firsts(self, i: int) -> tuple[int, int]:
        halves, each = len(self.pages) // 2, self.pages.shape[1]
        return i * each, (halves + i) * each

    def write(
        self, i: int, k: New, v: New, start: Int[Array, "B"], lengths: Int[Array, "B"]
    ) -> "Cache":
        """With a layer's keys and values of T tokens from position `start[b]` on.

        Those at `lengths[b]` or behind it are padding and go to the page of nobody, as does what
        lies behind the capacity.
        """
        positions = start[:, None] + jnp.arange(k.shape[1])
        page, slot = self._places(positions, positions < lengths[:, None])
        firsts = jnp.asarray(self._firsts(i))[:, None, None]
        where = page + jnp.where(page == NOBODY, 0, firsts)
        slots = jnp.broadcast_to(slot, where.shape)
        return self._with(write(self.flat, jnp.stack([k, v]), where, slots))

    def write_all(
        self, new: Float[Array, "2L B K H"], positions: Int[Array, "B"], live: Bool[Array, "B"]
    ) -> "Cache":
        """With one token's keys and values of every layer, for the rows that are live."""
        page, slot = self._places(positions, live)
        firsts = jnp.arange(len(self.pages))[:, None] * self.pages.shape[1]
        where = page + jnp.where(page == NOBODY, 0, firsts)
        return self._with(write(self.flat, new, where, jnp.broadcast_to(slot, where.shape)))

    def _places(
        self, positions: Int[Array, "B *T"], kept: Bool[Array, "B *T"]
    ) -> tuple[Int[Array, "B *T"], Int[Array, "B *T"]]:
        """The page and the slot in it of some positions of every row."""
        size = self.pages.shape[3]
        index = jnp.clip(positions // size, 0, self.tables.shape[1] - 1)
        pages = jnp.take_along_axis(self.tables, index.reshape(len(index), -1), axis=1)
        inside = kept & (positions >= 0) & (positions < self.capacity)
        return jnp.where(inside, pages.reshape(positions.shape), NOBODY), positions % size

    def _with(self, flat: Float[Array, "2LP K C H"]) -> "Cache":
        return dataclasses.replace(self, pages=flat.reshape(self.pages.shape))

    def layer(self, i: int) -> tuple[Keys, Keys]:
        """A layer's keys and values, position after position: a copy, to look at."""

        def gathered(table: Int[Array, "B n"]) -> Keys:
            pages = self.flat[table].swapaxes(1, 2)
            return pages.reshape(*pages.shape[:2], -1, pages.shape[-1])

        keys, values = map(gathered, self.layer_tables(i))
        return keys, values

    def with_layer(self, i: int, k: Keys, v: Keys) -> "Cache":
        """With other keys and values of a layer, for rows that share no page."""
        flat, (batch, heads, _, dim) = self.flat, k.shape
        for table, new in zip(self.layer_tables(i), (k, v), strict=True):
            paged = new.reshape(batch, heads, table.shape[1], -1, dim).swapaxes(1, 2)
            flat = flat.at[table].set(paged.astype(flat.dtype))
        return self._with(flat)


def create_pages(
    config: ModelConfig,
    pages: int,
    dtype: jnp.dtype,
    page: int = PAGE,
    sharding: jax.sharding.Sharding | None = None,
) -> Float[Array, "2L P K C H"]:
    """An empty pool of so many pages a layer, the one of nobody among them."""
    shape = (2 * config.num_layers, pages, config.num_kv_heads, page, config.head_dim)
    return jnp.zeros(shape, dtype, device=sharding)


def pages_for(positions: int) -> int:
    """Pages that so many positions take."""
    return -(-positions // PAGE)


def bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    """Bytes of cache one token takes, K and V of all layers counted."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def write(
    pages: Float[Array, "P K C H"],
    new: Float[Array, "*places K H"],
    page: Int[Array, "*places"],
    slot: Int[Array, "*places"],
) -> Float[Array, "P K C H"]:
    """Puts each token's keys, or values, into a slot of a page."""
    new = new.reshape(-1, *new.shape[-2:]).astype(pages.dtype)
    places = jnp.stack([page, slot], axis=-1).reshape(-1, 2)
    if len(new) == 1:  # XLA makes something else of one place, for which a CPU copies all pages
        new, places = jnp.repeat(new, 2, axis=0), jnp.repeat(places, 2, axis=0)
    return lax.scatter(
        pages,
        places,
        new,
        lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2),
            inserted_window_dims=(0, 2),
            scatter_dims_to_operand_dims=(0, 2),
        ),
        # But for places in the page of nobody, where any of them may win, and one place twice.
        unique_indices=True,
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
