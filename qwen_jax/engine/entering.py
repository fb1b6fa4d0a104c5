"""Pieces of texts as `extend` takes them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from qwen_jax.engine.engine import Engine


class Entering(NamedTuple):
    """Tokens that enter the cache from position `start` of a text that holds these pages."""

    pages: Sequence[int]
    start: int
    tokens: Sequence[int]


class Arrays(NamedTuple):
    """What `extend` is given, in its order."""

    tables: Int[np.ndarray, "R n"]
    tokens: Int[np.ndarray, "R T"]
    start: Int[np.ndarray, " R"]
    lengths: Int[np.ndarray, " R"]


def arrays_of(engine: Engine, rows: int, padded: int, pieces: Sequence[Entering]) -> Arrays:
    """Pieces in a call of so many rows of so many tokens; rows that are left over have none."""
    tokens = np.zeros((rows, padded), np.int32)
    start, lengths = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece.tokens)] = piece.tokens
        start[row], lengths[row] = piece.start, piece.start + len(piece.tokens)
    return Arrays(engine.tables([piece.pages for piece in pieces], rows), tokens, start, lengths)
