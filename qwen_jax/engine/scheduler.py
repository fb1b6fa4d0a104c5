"""Who runs when: texts wait in order, take a slot and pages, are extended in pieces, and decoded.

A turn admits whoever fits, first come, first served; puts pieces of admitted prompts into the
cache; and runs some decode steps of every text that is whole. A text that has ended leaves its slot
and its pages to the next one at once. Nobody overtakes: the first in line waits for the pages it
may need until its end, so that nothing that runs is ever thrown out, and everything gets its turn.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from pallas_kernels.sample_tokens import pack, words
from qwen_jax.engine import calls, steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.reading import logprobs_of, why_not
from qwen_jax.engine.sampling import PLANS, Plan, changes_scores, settings_of
from qwen_jax.engine.shapes import Piece, pieces_of
from qwen_jax.engine.texts import NO_SLOT, News, Text
from qwen_jax.errors import UserError
from qwen_jax.model.cache import PAGE, pages_for

MOST_CALLS = 4
"""Of `extend` in a turn where fewer than half of the slots run, and half as many where more do."""
PATIENCE = 4
"""Turns in a row that pieces may wait for others."""


class _Call(NamedTuple):
    """A call of `step` under way."""

    texts: list[Text]
    emitted: steps.Emitted


class _Scoring(NamedTuple):
    """A call of `score` under way, with the piece of a text in each row."""

    pieces: list[tuple[Text, Piece]]
    scored: steps.Scored


class Scheduler:
    """Texts through one engine. Several may take turns, on any threads: the slots of each are its
    own, and the engine's lock is held while one has its turn."""

    def __init__(self, engine: Engine):
        self.engine = engine
        split = engine.spec.split
        self._state = split.placed(steps.State.create(engine.shapes.slots))
        self._extras: steps.Extras | None = None
        self._waiting: deque[Text] = deque()
        self._entering: deque[tuple[Text, deque[Piece]]] = deque()
        self._running: list[Text] = []
        self._slots = list(reversed(range(engine.shapes.slots)))
        self._calls: deque[_Call | _Scoring] = deque()
        self._patience = PATIENCE
        self._scores: dict[Text, list[tuple[np.ndarray, np.ndarray]]] = {}

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do or to tell."""
        return not (self._waiting or self._entering or self._running or self._calls)

    @property
    def wants_more(self) -> bool:
        """Whether a text that is added now could take its turn at once, or soon."""
        return len(self._waiting) < self.engine.shapes.slots

    @property
    def waiting(self) -> int:
        """Texts that have no slot yet."""
        return len(self._waiting)

    def add(self, text: Text) -> None:
        """Puts a text at the end of the line. It must fit: see `Engine.room`."""
        self._waiting.append(text)

    def cancel(self, text: Text) -> None:
        """Ends a text wherever it is; nothing more is told of it.

        What is entering the cache goes on to: others may share its pages already.
        """
        text.over = True
        with self.engine.lock:
            if text in self._waiting:
                self._waiting.remove(text)
            elif not any(text is entering for entering, _ in self._entering):
                self._leave(text)

    def close(self) -> None:
        """Lets go of all that is left, once nothing is to be told any more.

        An interrupt may have come between taking a piece and putting it into the cache, so that of
        the pages that a text was to fill none counts.
        """
        with self.engine.lock:
            for text, _ in self._entering:
                self.engine.pool.forget(text.pages[text.shared_tokens // PAGE :])
            scored = [call.pieces for call in self._calls if isinstance(call, _Scoring)]
            left = [text for text, _ in itertools.chain(self._entering, *scored)]
            for text in [*self._waiting, *self._running, *left]:
                self._leave(text)

    def turn(self) -> list[News]:
        """Does what can be done now, and tells what is known by then: `start`, and `news`."""
        with self.engine.lock:
            self.start()
            return self.news()

    def start(self) -> None:
        """Hands the device what can be done now.

        Raises:
            UserError: there is nothing to wait for: other schedulers' texts hold the pages.
        """
        with self.engine.lock:
            self.engine.revive()
            self._admit()
            self._extend()
            self._step()

    def news(self) -> list[News]:
        """What is known by now.

        Raises:
            UserError: logits are not finite, or a text bans every token.
        """
        with self.engine.lock:
            news = list(self._step_constrained())
            busy = 1 if self.engine.shapes.ahead and (self._running or self._entering) else 0
            while len(self._calls) > busy:
                call = self._calls.popleft()
                news += self._read(call) if isinstance(call, _Call) else self._read_scores(call)
            return news

    def _admit(self) -> None:
        while self._waiting and (self._slots or self._waiting[0].score_from is not None):
            text = self._waiting[0]
            if not self._seat(text):
                if not (self._entering or self._running or self._calls):
                    raise UserError(
                        "Other texts that are being generated hold the whole cache; finish them, "
                        "or close their generators."
                    )
                break
            self._waiting.popleft()
            pieces = deque(pieces_of(text.shared_tokens, text.entering, self.engine.shapes))
            self._entering.append((text, pieces))

    def _seat(self, text: Text) -> bool:
        """Gives a text its pages and its slot, if there is room."""
        pool = self.engine.pool
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

    def _extend(self) -> None:
        """Some pieces of prompts, in the order of the line."""
        for _ in range(self._calls_of_extend()):
            pieces = self._next_pieces(self.engine.shapes.pieces[-1])
            size = self._rows_of(pieces) if pieces else 1
            for start in range(0, len(pieces), size):
                self._put(pieces[start : start + size], size)
            while self._entering and not self._entering[0][1]:
                text, _ = self._entering.popleft()
                if text.over:
                    self._leave(text)
                elif text.score_from is None:
                    self._begin(text)

    def _calls_of_extend(self) -> int:
        """Full calls as long as there are pieces for them, a few at most: so long may those that
        run have to wait for their next steps.

        One that is not full takes nearly as long. It waits for more pieces while nearly all slots
        run and others wait in line, but not for many turns.
        """
        shapes, running = self.engine.shapes, len(self._running)
        full = sum(len(pieces) for _, pieces in self._entering) // shapes.pieces[-1]
        calls = min(full, MOST_CALLS if 2 * running < shapes.slots else MOST_CALLS // 2)
        busy = bool(self._waiting) and 8 * running > 7 * shapes.slots
        if calls == 0 and self._entering and (not busy or self._patience == 0):
            calls = 1
        self._patience = PATIENCE if calls or not self._entering else self._patience - 1
        return calls

    def _next_pieces(self, most: int) -> list[tuple[Text, Piece]]:
        """Those that can be in one call: as long as the first, and all scored or none."""
        taken: list[tuple[Text, Piece]] = []
        for text, pieces in self._entering:
            while pieces and len(taken) < most:
                if taken and (
                    pieces[0].padded != taken[0][1].padded
                    or self._scored(text, pieces[0]) != self._scored(*taken[0])
                ):
                    return taken
                taken.append((text, pieces.popleft()))
        return taken

    def _scored(self, text: Text, piece: Piece) -> bool:
        """Whether a piece has a token after which comes one to be scored."""
        return text.score_from is not None and piece.start + piece.length >= text.score_from

    def _rows_of(self, pieces: list[tuple[Text, Piece]]) -> int:
        """Of the calls that put these pieces into the cache; of `score` there is one size."""
        if self._scored(*pieces[0]):
            return self.engine.shapes.pieces[-1]
        return self.engine.pieces_for(len(pieces))

    def _put(self, pieces: list[tuple[Text, Piece]], rows: int) -> None:
        engine, padded = self.engine, pieces[0][1].padded
        scored = self._scored(*pieces[0])
        tokens = np.zeros((rows, padded), np.int32)
        start, lengths = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        targets = np.zeros_like(tokens) if scored else tokens
        for row, (text, piece) in enumerate(pieces):
            stop = piece.start + piece.length
            tokens[row, : piece.length] = text.tokens[piece.start : stop]
            if scored:
                targets[row, : piece.length] = text.tokens[piece.start + 1 : stop + 1]
            start[row], lengths[row] = piece.start, stop
        tables = engine.tables([text.pages for text, _ in pieces], rows)
        given = engine.weights, engine.pages, tables, tokens, start, lengths
        if scored:
            engine.pages, found = calls.score(engine.spec, *given, targets)
            self._calls.append(_Scoring(pieces, found))
        else:
            engine.pages = calls.extend(engine.spec.without_tokenizer, *given)
        for text, piece in pieces:
            if (piece.start + piece.length) % PAGE == 0:
                engine.pool.filled(text.pages[piece.start // PAGE])

    def _begin(self, text: Text) -> None:
        """A text whose prompt is in the cache, but for its last token, is decoded from now on."""
        vocab, sampling = self.engine.config.vocab_size, text.sampling
        self._running.append(text)
        masked = text.constraint is not None
        own = (text.slot, 1, 1, text.tokens[-1], 0, text.entering, text.limit)
        numbers = [np.array([number], np.int32) for number in own]
        row = steps.Rows._make([*numbers, settings_of(sampling, text.top, masked)])
        text.row = steps.pack_rows(row)[0]
        if changes_scores(sampling):
            bias = np.zeros(vocab, np.float32)
            bias[list(sampling.logit_bias)] = list(sampling.logit_bias.values())
            seen = pack([text.tokens], vocab)[0]
            allowed = np.zeros(words(vocab), np.uint32)
            slot = np.int32(text.slot)
            self._extras = calls.insert(self._all_extras(), slot, seen, allowed, bias)

    def _all_extras(self) -> steps.Extras:
        """Those of all slots, made when the first text asks for any."""
        if self._extras is not None:
            return self._extras
        slots, vocab = self.engine.shapes.slots, self.engine.config.vocab_size
        return self.engine.spec.split.placed(steps.Extras.create(slots, vocab))

    def _step(self) -> None:
        """Some decode steps of everyone who runs without a constraint; who has then had all its
        tokens, leaves."""
        texts = [text for text in self._running if text.constraint is None]
        if not texts:
            return
        engine, shapes = self.engine, self.engine.shapes
        plan = Plan.of(((t.sampling, t.top) for t in texts), engine.config.vocab_size)
        rows = self._rows(texts, plan)
        for text in texts:
            text.expected = min(text.expected + shapes.steps, text.limit)
        engine.pages, self._state, extras, emitted = calls.step(
            engine.spec,
            engine.weights,
            engine.pages,
            engine.tables([text.pages for text in texts], len(rows)),
            self._state,
            self._all_extras() if plan.sampled else None,
            rows,
            plan,
            shapes.steps,
        )
        if extras is not None:
            self._extras = extras
        self._calls.append(_Call(texts, emitted))
        for text in texts:
            if text.expected >= text.limit:
                self._leave(text)

    def _rows(self, texts: list[Text], plan: Plan) -> np.ndarray:
        """What a step is told of these texts; after the first one a device knows their tokens."""
        size = self.engine.rows_for(len(texts), plan, texts[0].constraint is not None)
        rows = np.zeros((size, steps.FIELDS), np.int32)
        rows[:, 0] = self.engine.shapes.slots  # nobody's, and out of bounds
        for row, text in zip(rows, texts, strict=False):
            row[:] = text.row
            text.row[steps.FRESH] = 0
        return rows

    def _step_constrained(self) -> Iterator[News]:
        """As many decode steps of those with a constraint, each in two halves. While a device is at
        the first, the host reads what it chose last and finds out what may come next.

        They have calls of their own, since others need not wait for the host at each of their
        tokens.
        """
        engine = self.engine
        last: _Call | None = None
        for _ in range(engine.shapes.steps):
            texts = [text for text in self._running if text.constraint is not None]
            if not texts:
                break
            asked = [(text.sampling, text.top) for text in texts]
            plan = Plan(True, max(Plan.of(asked, engine.config.vocab_size).top, PLANS[1].top))
            rows = self._rows(texts, plan)
            tables = engine.tables([text.pages for text in texts], len(rows))
            engine.pages, logits = calls.advance(
                engine.spec, engine.weights, engine.pages, tables, self._state, rows
            )
            if last is not None:
                yield from self._read(last)
            allowed = np.zeros((len(rows), words(engine.config.vocab_size)), np.uint32)
            yield from self._fill(allowed, texts)
            given = logits, self._state, self._all_extras(), rows, allowed
            self._state, self._extras, emitted = calls.choose(engine.spec, *given, plan)
            last = _Call(texts, emitted)
        if last is not None:
            yield from self._read(last)

    def _fill(self, allowed: np.ndarray, texts: list[Text]) -> Iterator[News]:
        """What each text may choose next, in its row; or that its constraint fails. Of those that
        have just ended this step is nothing, and its row stays empty."""
        rows = [row for row, text in enumerate(texts) if not text.over]
        held = [texts[row].constraint for row in rows]
        masks = np.zeros((len(rows), allowed.shape[1]), np.uint32)
        found = type(held[0]).fill(held, masks) if held and held[0] is not None else []
        allowed[rows] = masks
        for row, why in zip(rows, found, strict=True):
            if why is not None:
                text = texts[row]
                text.over = True
                self._leave(text)
                yield News(text, [], None, None, True, why)

    def _leave(self, text: Text) -> None:
        """Slot and pages go to the next: what a device still does with them comes before."""
        if text in self._running:
            self._running.remove(text)
        if text.slot != NO_SLOT:
            self._slots.append(text.slot)
            text.slot = NO_SLOT
        self.engine.pool.release(text.pages)
        text.pages = []

    def _read(self, call: _Call) -> Iterator[News]:
        """Waits for a call of `step`, and tells what it chose."""
        if any(text.top is not None for text in call.texts):
            tokens, logprobs = jax.device_get(call.emitted)
        else:  # To fetch what nobody reads would take longest.
            tokens, logprobs = np.asarray(call.emitted.token), None
        for row, text in enumerate(call.texts):
            if text.over:
                continue
            chosen: list[int] = tokens[:, row].tolist()
            if steps.NOT_LIVE in chosen:
                chosen = chosen[: chosen.index(steps.NOT_LIVE)]
            if why := why_not(chosen, self.engine):
                text.over = True
                self._leave(text)
                yield News(text, [], None, None, True, why)
                continue
            if not chosen:
                continue
            if text.constraint is not None:
                text.constraint.take(chosen[0])
            stopped = chosen[-1] in self.engine.spec.stop_ids
            text.given += len(chosen)
            text.over = stopped or text.given >= text.limit
            if text.over:
                self._leave(text)
            shown = None if text.top is None else logprobs_of(logprobs, row, len(chosen))
            yield News(text, chosen, shown, None, text.over)

    def _read_scores(self, call: _Scoring) -> Iterator[News]:
        """Waits for a call of `score`, and tells of the texts that it finishes."""
        found = jax.device_get(call.scored)
        for row, (text, piece) in enumerate(call.pieces):
            if text.over:
                continue
            assert text.score_from is not None
            # Position p's logits are of the token at p + 1.
            part = slice(max(text.score_from - 1 - piece.start, 0), piece.length)
            parts = self._scores.setdefault(text, [])
            parts.append((found.logprob[row, part], found.greedy[row, part]))
            if piece.start + piece.length == text.entering:
                text.over = True
                self._leave(text)
                logprob, greedy = (np.concatenate(p) for p in zip(*parts, strict=True))
                del self._scores[text]
                yield News(text, [], None, (logprob, greedy), True)
