"""The paged cache: a pool of pages, and each row's block table, which names its pages in order."""

import dataclasses

import jax

from pallas_kernels.decode_step.packed.plan import ModelShape
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V

FEWEST_SLOTS = 128
"""Of a page: those that a block's warps attend to in one turn."""


@dataclasses.dataclass(frozen=True)
class Pool:
    """Sizes of the cache.

    Attributes:
        pages: P, of each layer's keys, and as many of its values.
        slots: C, of a page.
        table: n, pages that a row's block table names.
    """

    pages: int
    slots: int
    table: int

    @classmethod
    def of(cls, pages: jax.Array, tables: jax.Array) -> "Pool":
        """From the arrays `[2L, P, K, C, H]` and `[B, n]`, or their shapes."""
        return cls(pages.shape[1], pages.shape[3], tables.shape[1])

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.table * self.slots


@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Where keys and values lie.

    Attributes:
        pages, tables: addresses of the pool and of the block tables.
    """

    shape: ModelShape
    pool: Pool
    pages: V
    tables: V

    @property
    def slot_bytes(self) -> int:
        """Of a head's key or value."""
        return 2 * self.shape.head_dim

    @property
    def values(self) -> int:
        """Bytes from a key to its value."""
        pages = self.shape.layers * self.pool.pages
        return pages * self.shape.kv_heads * self.pool.slots * self.slot_bytes

    def page(self, row: V, slot: V) -> V:
        """The page that holds a slot of a row."""
        entry = row * self.pool.table + slot // self.pool.slots
        return t.load_global(self.tables + (entry << 2).wide())[0]

    def key(self, layer: V, kv_head: V, page: V, slot: V) -> V:
        """The address of a head's key in a slot of that page; the page's next ones follow."""
        of_layer = layer * self.pool.pages + page
        of_head = (of_layer * self.shape.kv_heads + kv_head).wide()
        # Pools are larger than 32 bits can address.
        return (
            self.pages
            + of_head * (self.pool.slots * self.slot_bytes)
            + (slot % self.pool.slots * self.slot_bytes).wide()
        )
