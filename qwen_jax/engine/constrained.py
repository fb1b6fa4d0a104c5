"""Decode steps of texts with a constraint, each in two halves.

While a device is at the first half, the logits, the host reads what it chose last and finds out
what may come next; then the device chooses. So it waits for the host only where masks take longer
than logits.

Where a constraint leaves one way alone, as between two values of a JSON object, the tokens are
known before the model has seen them: they enter the cache together, as those of a prompt do, where
that is less work than a step for each.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_kernels.sample_tokens import words
from qwen_jax.engine import calls, steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.extending import Pieces
from qwen_jax.engine.reading import logprobs_of, why_not
from qwen_jax.engine.rows import FRESH, MASKED, SLOT, goes_on, nobodys
from qwen_jax.engine.sampling import IN_HALVES, Plan, changes_scores, looks_at_scores
from qwen_jax.engine.shapes import Piece, fitting, pieces_of
from qwen_jax.engine.texts import News, Text

POSITIONS = {"cpu": 16}
MANY_POSITIONS = 128
"""Of `extend` that take as long as a decode step: on a CPU, and on others. On an H200 256 take one
to two steps (benchmarks/results/gpu_prefill.md, gpu_decode.md)."""


class _Rows(NamedTuple):
    """What a step is told of some texts; `scored` if it looks at their penalties and biases.

    Attributes:
        own: `packed` on the host.
        packed, tables: on the devices, since most steps are told what the one before was.
    """

    texts: list[Text]
    own: np.ndarray
    packed: Any
    tables: Any
    plan: Plan
    scored: bool


class _Half(NamedTuple):
    """The first half of a step, under way."""

    rows: _Rows
    logits: jax.Array


class _Chosen(NamedTuple):
    """The second half of one, which has not been read."""

    texts: list[Text]
    emitted: steps.Emitted


class Halves:
    """The texts with a constraint of one scheduler.

    Args:
        leave: lets go of what a text holds that has ended.
    """

    def __init__(self, engine: Engine, leave: Callable[[Text], None]):
        self._engine, self._leave = engine, leave
        self._half: _Half | None = None
        self._chosen: _Chosen | None = None
        self._last: _Rows | None = None  # of a step like which the next one is, unless texts change
        width = words(engine.config.vocab_size)
        self._masks = [np.zeros((0, width), np.uint32) for _ in range(2)]

    def step(
        self, running: Sequence[Text], state: steps.State, all_extras: Callable[[], steps.Extras]
    ) -> Generator[News, None, tuple[steps.State, steps.Extras | None]]:
        """Some steps of those that run and are held by masks; others in between do no harm, nor
        texts that leave. Lets those go that need none.

        Args:
            all_extras: gives those of all slots.

        Returns:
            What the slots' state is then, and their extras, unless nobody looked at them.
        """
        engine, extras = self._engine, None
        for _ in range(engine.shapes.steps):
            half, self._half = self._half or self._advance(running, state), None
            yield from self._read()
            if half is None:
                break
            texts, own, packed, _, plan, scored = half.rows
            held = [None if text.over else text.constraint for text in texts]
            kind = next((type(one) for one in held if one is not None), None)
            if kind is None:
                continue
            allowed = self._masks_for(len(own))
            failed = kind.fill(held, allowed)
            if None in held:  # The slot of who has ended may be another's by now.
                own = own.copy()
                over = [row for row, one in enumerate(held) if one is None]
                own[over, SLOT] = engine.shapes.slots
                packed = engine.spec.split.placed(own)
            looked_at = (extras or all_extras()) if scored else None
            given = half.logits, state, looked_at, packed, allowed
            how = plan, engine.layout.unmasked
            state, kept, emitted = calls.choose(engine.spec, *given, *how)
            emitted.token.copy_to_host_async()
            extras, self._chosen = kept or extras, _Chosen(texts, emitted)
            self._jump(texts, len(running))
            if engine.shapes.ahead:
                self._half = self._advance(running, state)
            for text, why in zip(texts, failed, strict=True):
                if why is not None:
                    yield self._failed(text, why)
        if not engine.shapes.ahead:
            yield from self._read()
        under_way = [*(self._half.rows.texts if self._half is not None else ())]
        under_way += self._chosen.texts if self._chosen is not None else ()
        for text in running:
            if text.trust is not None and text.trust.leaving and text not in under_way:
                text.trust.let_go()
                text.row[MASKED] = 0
                self._last = None
        return state, extras

    def _masks_for(self, rows: int) -> np.ndarray:
        """Masks that nobody reads, to be filled. Devices may read a host's memory in place, and a
        token has been read here as soon as one device of a mesh has chosen it; the others have
        chosen theirs before any can end the step after. So there are two, in turns."""
        self._masks.reverse()
        if len(self._masks[0]) != rows:
            self._masks[0] = np.zeros((rows, self._masks[0].shape[1]), np.uint32)
        return self._masks[0]

    def _advance(self, running: Sequence[Text], state: steps.State) -> _Half | None:
        """Begins a step of all that are held and have not ended, as far as is known."""
        texts = [
            text
            for text in running
            if text.masked and not text.over and not (text.trust and text.trust.leaving)
        ]
        if not texts:
            return None
        engine = self._engine
        if (rows := self._last) is None or rows.texts != texts:
            rows = self._rows(texts)
            fresh = any(text.row[FRESH] for text in texts)
            self._last = None if fresh else rows
            for text in texts:
                text.row[FRESH] = 0
        given = engine.weights, engine.pages, rows.tables, state, rows.packed
        engine.pages, logits = calls.advance(engine.spec, *given)
        return _Half(rows, logits)

    def _rows(self, texts: list[Text]) -> _Rows:
        engine = self._engine
        asked = [(text.sampling, text.top) for text in texts]
        plan = Plan(True, max(Plan.of(asked, engine.config.vocab_size).top, IN_HALVES.top))
        own = nobodys(engine.rows_for(len(texts), plan, True), engine.shapes.slots)
        own[: len(texts)] = [text.row for text in texts]
        tables = engine.tables([text.pages for text in texts], len(own))
        scored = looks_at_scores((text.sampling for text in texts), engine.shapes.batch_invariant)
        return _Rows(texts, own, *engine.spec.split.placed((own, tables)), plan, scored)

    def _read(self) -> Iterator[News]:
        """Waits for what was chosen last, and tells it."""
        if self._chosen is None:
            return
        (texts, emitted), self._chosen = self._chosen, None
        codes, *of_all = jax.device_get(emitted.token).tolist()
        logprobs = None
        if any(text.top is not None and not text.over for text in texts):
            logprobs = jax.device_get(emitted.logprobs)
        told: list[tuple[Text, list[int]]] = []
        stop_ids = self._engine.spec.stop_ids
        for row, (text, code) in enumerate(zip(texts, codes, strict=False)):
            if text.over or code == steps.NOT_LIVE:
                continue
            if code < 0 and (why := why_not([code], self._engine)) is not None:
                yield self._failed(text, why)
                continue
            if text.trust is not None:
                text.trust.chose(alone=code == of_all[0][row])
            tokens, text.jump = [code, *text.jump], []
            text.last = tokens[-1]
            text.given += len(tokens)
            text.over = tokens[-1] in stop_ids or text.given >= text.limit
            if text.over:
                self._leave(text)
            told.append((text, tokens))
            shown = None if text.top is None else logprobs_of(logprobs, [(0, row)])
            yield News(text, tokens, shown, None, text.over)
        going = [(text.constraint, tokens) for text, tokens in told if not text.over]
        if going and going[0][0] is not None:
            type(going[0][0]).take(*zip(*going, strict=True))

    def _failed(self, text: Text, why: str) -> News:
        text.over = True
        self._leave(text)
        return News(text, [], None, None, True, why)

    def _jump(self, texts: Sequence[Text], running: int) -> None:
        """Puts tokens that are known into the cache, behind the one that each text is to choose in
        the step under way, if that is less work; each notes its own, and goes on behind them.

        Whether it is depends on neighbours, and so a batch-invariant engine never does. Who wants
        log-probabilities needs a step for each token; counts for penalties are the device's.

        Args:
            running: texts that wait meanwhile.
        """
        engine = self._engine
        if engine.shapes.batch_invariant:
            return
        found = [
            jump
            for text in texts
            if not text.over and text.constraint is not None and len(text.constraint.forced) > 1
            if (jump := _Jump.of(engine, text)) is not None
        ]
        if not found:
            return
        jumps = sorted(found, key=lambda jump: -len(jump.known))
        best, gain, saved = 0, 0.0, 0
        lengths: Counter[int] = Counter()
        for count, jump in enumerate(jumps, 1):
            saved += len(jump.known)
            lengths.update(piece.padded for piece in jump.pieces)
            won = saved - running * self._cost(lengths)
            if won > gain:
                best, gain = count, won
        for padded in sorted(lengths) if best else ():
            pieces = [
                (jump, piece)
                for jump in jumps[:best]
                for piece in jump.pieces
                if piece.padded == padded
            ]
            rows = fitting(engine.shapes.sizes(padded), len(pieces))
            for start in range(0, len(pieces), rows):
                part = pieces[start : start + rows]
                put = [(jump.text, piece) for jump, piece in part]
                Pieces.of(engine, put, [jump.tokens for jump, _ in part], rows).into(engine)
        for text, known, *_ in jumps[:best]:
            self._last, text.jump = None, known
            goes_on(text.row, known[-1], text.given + 1 + len(known))

    def _cost(self, lengths: Mapping[int, int]) -> float:
        """Of so many pieces of each length, in decode steps."""
        positions = 0
        for padded, count in lengths.items():
            rows = fitting(self._engine.shapes.sizes(padded), count)
            positions += -(-count // rows) * rows * padded
        return positions / POSITIONS.get(self._engine.platform, MANY_POSITIONS)


class _Jump(NamedTuple):
    """What may enter the cache of a text at once.

    Attributes:
        known: the tokens behind the next one.
        tokens: of the whole text; the places of those that are in the cache already are empty.
        pieces: of the next one and those behind it, but for the last, which is a step's.
    """

    text: Text
    known: list[int]
    tokens: list[int]
    pieces: list[Piece]

    @classmethod
    def of(cls, engine: Engine, text: Text) -> "_Jump | None":
        """A text's, if there is any."""
        if not (known := _known(text, engine.spec.stop_ids)):
            return None
        assert text.constraint is not None
        first = text.entering + text.given + 1
        tokens = [*[0] * first, text.constraint.forced[0], *known[:-1]]
        return cls(text, known, tokens, list(pieces_of(first, len(tokens), engine.shapes)))


def _known(text: Text, stop_ids: Sequence[int]) -> list[int]:
    """The tokens that must come behind the next one, as far as the text may go."""
    if text.constraint is None or text.top is not None or changes_scores(text.sampling):
        return []
    forced = text.constraint.forced[: text.limit - text.given]
    return list(itertools.takewhile(lambda token: token not in stop_ids, forced))[1:]
