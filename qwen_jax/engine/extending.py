"""What a call that puts pieces of texts into the cache is told of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from qwen_jax.engine import calls
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.shapes import Piece
from qwen_jax.engine.texts import Text


class Pieces(NamedTuple):
    """Pieces of texts, all of one length, in the rows of one call; rows after them are empty.

    Attributes:
        tables: of each row its text's pages.
        tokens: padded.
        start, stop: positions of the first, and after the last.
    """

    tables: Int[np.ndarray, "R n"]
    tokens: Int[np.ndarray, "R T"]
    start: Int[np.ndarray, "R"]
    stop: Int[np.ndarray, "R"]

    @classmethod
    def of(
        cls,
        engine: Engine,
        pieces: Sequence[tuple[Text, Piece]],
        tokens: Sequence[Sequence[int]],
        rows: int,
    ) -> "Pieces":
        """In so many rows; of each text all its tokens, as far as they are known."""
        found = np.zeros((rows, pieces[0][1].padded), np.int32)
        start, ends = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for row, ((_, piece), all_of) in enumerate(zip(pieces, tokens, strict=True)):
            stop = piece.start + piece.length
            found[row, : piece.length] = all_of[piece.start : stop]
            start[row], ends[row] = piece.start, stop
        return cls(engine.tables([text.pages for text, _ in pieces], rows), found, start, ends)

    def into(self, engine: Engine) -> None:
        """Puts them into an engine's cache."""
        given = engine.weights, engine.pages, *self
        engine.pages = calls.extend(engine.spec.without_tokenizer, *given)
