"""A cache laid out in pages, scattered over a pool, as the attention operations read it."""

from typing import NamedTuple

import numpy as np

NO_PAGES = (-(2**31), -1, 2**31 - 1, 1 << 20)
"""What the tables hold where a row needs no page, beside numbers of other rows' pages."""


class Paged(NamedTuple):
    pages: np.ndarray  # [P, K, C, H]
    k_tables: np.ndarray  # [B, n]
    v_tables: np.ndarray


def paged(
    k: np.ndarray,
    v: np.ndarray,
    lengths: np.ndarray,
    page: int,
    seed: int,
    poison: float = np.nan,
    entries: int = 0,
) -> Paged:
    """Keys and values [B, K, S, H], whose rows hold `lengths`, in pages of `page` slots.

    Pages lie in random order among others full of `poison`, which also fills the last page's
    slots past S; pages of equal content are held once, so that rows with a common beginning
    share it. The pool's size is that of the cache, whatever the lengths; the tables have at least
    so many `entries`.
    """
    rng = np.random.default_rng(seed)
    rows, kv_heads, slots, dim = k.shape
    needed = -(-slots // page)
    held: dict[bytes, int] = {}
    contents: list[np.ndarray] = []
    tables = np.full((2, rows, max(needed, entries)), -1)
    for which, cache in enumerate((k, v)):
        for row, length in enumerate(lengths):
            for j in range(-(-int(length) // page)):
                content = np.full((kv_heads, page, dim), poison, k.dtype)
                part = cache[row, :, j * page : (j + 1) * page]
                content[:, : part.shape[1]] = part
                tables[which, row, j] = held.setdefault(content.tobytes(), len(contents))
                if tables[which, row, j] == len(contents):
                    contents.append(content)
    pool = np.full((2 * rows * needed + 3, kv_heads, page, dim), poison, k.dtype)
    places = rng.permutation(len(pool))[: len(contents)]
    pool[places] = contents
    unused = rng.choice([*NO_PAGES, *range(len(pool))], tables.shape)
    numbers = np.where(tables < 0, unused, places[tables]).astype(np.int32)
    return Paged(pool, *numbers)
