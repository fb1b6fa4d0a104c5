"""What the host tells a step of its rows: one array of numbers, which one transfer brings over."""

from typing import NamedTuple

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.sample_tokens import Settings, settings


class Rows(NamedTuple):
    """The rows of one call of `step`, as the host says; `pack_rows` makes one array of them.

    Attributes:
        slot: whose state the row has.
        live: whether it runs.
        fresh: whether token and generated are the host's, and the row isn't done.
        token: the next to enter the cache.
        generated: tokens chosen so far.
        start: the first token's position when none was generated.
        limit: tokens to generate at most.
        settings: how tokens are chosen.
    """

    slot: Int[Array, "R"]
    live: Int[Array, "R"]
    fresh: Int[Array, "R"]
    token: Int[Array, "R"]
    generated: Int[Array, "R"]
    start: Int[Array, "R"]
    limit: Int[Array, "R"]
    settings: Settings


def pack_rows(rows: Rows) -> Int[np.ndarray, "R fields"]:
    """All numbers of the rows' in one array, which one transfer brings to the device."""
    columns = [np.asarray(column).view(np.int32) for column in jax.tree.leaves(rows)]
    return np.concatenate(columns).reshape(len(columns), -1).T


def unpacked(packed: Int[Array, "R fields"]) -> Rows:
    """What `pack_rows` made one array of."""
    columns = iter(packed.T)
    own = [next(columns) for _ in Rows._fields[:-1]]
    numbers = (
        lax.bitcast_convert_type(column, dtype)
        for column, dtype in zip(columns, _DTYPES, strict=True)
    )
    return Rows._make([*own, Settings._make(numbers)])


_DTYPES = [column.dtype for column in settings(1)]
SLOT, FRESH, TOKEN, GENERATED = map(Rows._fields.index, ("slot", "fresh", "token", "generated"))
MASKED = len(Rows._fields) - 1 + Settings._fields.index("masked")
FIELDS = len(Rows._fields) - 1 + len(_DTYPES)
"""Numbers of a row in what `pack_rows` makes, and the places of some of them."""


def nobodys(count: int, slots: int) -> Int[np.ndarray, "R fields"]:
    """Rows of no text: their slot is out of bounds."""
    rows = np.zeros((count, FIELDS), np.int32)
    rows[:, SLOT] = slots
    return rows


def goes_on(row: Int[np.ndarray, " fields"], token: int, generated: int) -> None:
    """Has a text go on elsewhere than where its slot's state is."""
    row[FRESH], row[TOKEN], row[GENERATED] = 1, token, generated
