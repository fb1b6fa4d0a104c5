"""How texts get in: they wait in order, take pages and a slot, and are extended in pieces."""

import itertools
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from qwen_jax.engine import calls, steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.extending import Pieces
from qwen_jax.engine.shapes import Piece, pieces_of
from qwen_jax.engine.texts import NO_SLOT, News, Text
from qwen_jax.errors import UserError
from qwen_jax.model.cache import PAGE, pages_for

MOST_CALLS = 4
"""Of `extend` in a turn where fewer than half of the slots run, and half as many where more do."""
PATIENCE = 4
"""Turns in a row that pieces may wait for others."""


class Scoring(NamedTuple):
    """A call of `score` under way, with the piece of a text in each row."""

    pieces: list[tuple[Text, Piece]]
    scored: steps.Scored


class Entrance:
    """The line of one scheduler, its slots, and the texts on their way into the cache.

    Attributes:
        waiting: texts that have no pages yet.
        entering: those that have, with what is still to be put into the cache.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self.waiting: deque[Text] = deque()
        self.entering: deque[tuple[Text, deque[Piece]]] = deque()
        self._slots = list(reversed(range(engine.shapes.slots)))
        self._patience = PATIENCE
        self._scores: dict[Text, list[steps.Scored]] = {}

    def is_entering(self, text: Text) -> bool:
        """Whether a text is on its way into the cache."""
        return any(text is entering for entering, _ in self.entering)

    def admit(self, busy: bool) -> None:
        """Gives the first in line their pages and slots, as far as there is room.

        Args:
            busy: whether there is something that will make room.

        Raises:
            UserError: there is nothing to wait for: other schedulers' texts hold the pages.
        """
        while self.waiting and (self._slots or self.waiting[0].score_from is not None):
            text = self.waiting[0]
            if not self._seat(text):
                if not (self.entering or busy):
                    raise UserError(
                        "Other texts that are being generated hold the whole cache; finish them, "
                        "or close their generators."
                    )
                break
            self.waiting.popleft()
            pieces = deque(pieces_of(text.shared_tokens, text.entering, self._engine.shapes))
            self.entering.append((text, pieces))

    def _seat(self, text: Text) -> bool:
        """Gives a text its pages and its slot, if there is room."""
        pool = self._engine.pool
        whole = (text.entering if text.score_from is None else text.score_from - 1) // PAGE
        pages = pool.shared(text.keys[:whole], self)
        needed = max(1, pages_for(text.entering + text.limit)) - len(pages)
        if needed > pool.available:
            pool.release(pages)
            return False
        text.shared_tokens = len(pages) * PAGE
        text.pages = pages + pool.take(needed)
        for page, key in zip(text.pages, text.keys, strict=False):
            pool.remember(page, key, self)
        if text.score_from is None:
            text.slot = self._slots.pop()
        return True

    def leave(self, text: Text) -> None:
        """Slot and pages go to the next: what a device still does with them comes before."""
        if text.slot != NO_SLOT:
            self._slots.append(text.slot)
            text.slot = NO_SLOT
        self._engine.pool.release(text.pages)
        text.pages = []

    def forget_entering(self) -> None:
        """Of what is to be put into the cache nothing will be.

        An interrupt may have come between taking a piece and putting it in, so that of the pages
        that a text was to fill none counts.
        """
        for text, _ in self.entering:
            self._engine.pool.forget(text.pages[text.shared_tokens // PAGE :])

    def extend(self, running: int) -> Iterator[Scoring | Text]:
        """Puts some pieces of prompts into the cache, in the order of the line.

        Yields:
            Calls that score, and texts that are whole now and are to be decoded.
        """
        for _ in range(self._calls_of_extend(running)):
            if pieces := self._next_pieces():
                scored, length = _scored(*pieces[0]), pieces[0][1].padded
                size = self._engine.pieces_for(len(pieces), length, scored)
                for start in range(0, len(pieces), size):
                    yield from self._put(pieces[start : start + size], size)
            while self.entering and not self.entering[0][1]:
                text, _ = self.entering.popleft()
                if text.over:
                    self.leave(text)
                elif text.score_from is None:
                    yield text

    def _calls_of_extend(self, running: int) -> int:
        """Full calls as long as there are pieces for them, a few at most: so long may those that
        run have to wait for their next steps.

        One that is not full takes nearly as long. It waits for more pieces while nearly all slots
        run and others wait in line, but not for many turns.
        """
        shapes = self._engine.shapes
        lengths = (piece.padded for _, pieces in self.entering for piece in pieces)
        # What is behind these would make no more calls, and may be many thousands.
        first = Counter(itertools.islice(lengths, MOST_CALLS * shapes.pieces[-1]))
        full = sum(count // shapes.sizes(length)[-1] for length, count in first.items())
        calls = min(full, MOST_CALLS if 2 * running < shapes.slots else MOST_CALLS // 2)
        busy = bool(self.waiting) and 8 * running > 7 * shapes.slots
        if calls == 0 and self.entering and (not busy or self._patience == 0):
            calls = 1
        self._patience = PATIENCE if calls or not self.entering else self._patience - 1
        return calls

    def _next_pieces(self) -> list[tuple[Text, Piece]]:
        """Those that can be in one call: as long as the first, and all scored or none."""
        taken: list[tuple[Text, Piece]] = []
        for text, pieces in self.entering:
            while pieces:
                if taken and not self._goes_with(text, pieces[0], taken):
                    # Nobody overtakes: who comes after may share a page that this one fills.
                    return taken
                taken.append((text, pieces.popleft()))
        return taken

    def _goes_with(self, text: Text, piece: Piece, taken: list[tuple[Text, Piece]]) -> bool:
        first = taken[0]
        return (
            len(taken) < self._engine.shapes.sizes(first[1].padded)[-1]
            and piece.padded == first[1].padded
            and _scored(text, piece) == _scored(*first)
        )

    def _put(self, pieces: list[tuple[Text, Piece]], rows: int) -> Iterator[Scoring]:
        engine = self._engine
        put = Pieces.of(engine, pieces, [text.tokens for text, _ in pieces], rows)
        scoring: list[Scoring] = []
        if _scored(*pieces[0]):
            targets = np.zeros_like(put.tokens)
            for row, (text, piece) in enumerate(pieces):
                after = text.tokens[piece.start + 1 : piece.start + piece.length + 1]
                targets[row, : piece.length] = after
            given = engine.weights, engine.pages, *put, targets
            engine.pages, found = calls.score(engine.spec, *given)
            scoring = [Scoring(pieces, found)]
        else:
            put.into(engine)
        if engine.draft is not None:  # whose pages are shared, too
            put.into(engine.draft)
        for text, piece in pieces:
            if (piece.start + piece.length) % PAGE == 0:
                engine.pool.filled(text.pages[piece.start // PAGE])
        yield from scoring

    def read(self, call: Scoring) -> Iterator[News]:
        """Waits for a call of `score`, and tells of the texts that it finishes."""
        found = jax.device_get(call.scored)
        for row, (text, piece) in enumerate(call.pieces):
            if text.over:
                continue
            assert text.score_from is not None
            # Position p's logits are of the token at p + 1.
            part = slice(max(text.score_from - 1 - piece.start, 0), piece.length)
            parts = self._scores.setdefault(text, [])
            parts.append(steps.Scored(*(x[row, part] for x in found)))
            if piece.start + piece.length == text.entering:
                text.over = True
                self.leave(text)
                whole = steps.Scored._make(map(np.concatenate, zip(*parts, strict=True)))
                del self._scores[text]
                yield News(text, [], None, whole, True)


def _scored(text: Text, piece: Piece) -> bool:
    """Whether a piece has a token after which comes one to be scored."""
    return text.score_from is not None and piece.start + piece.length >= text.score_from
