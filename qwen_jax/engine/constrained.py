"""What texts with a constraint may choose next, and what is known of the tokens behind that.

Where a constraint leaves one way alone, as between two values of a JSON object, the tokens are
known before the model has seen them: they enter the cache together, as those of a prompt do, where
that is less work than a step for each of them.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32

from pallas_kernels.sample_tokens import words
from qwen_jax.engine import calls, steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.entering import Entering, arrays_of
from qwen_jax.engine.sampling import changes_scores
from qwen_jax.engine.shapes import fitting, pieces_of
from qwen_jax.engine.texts import Text

POSITIONS = {"cpu": 16}
MANY_POSITIONS = 128
"""Of `extend` that take as long as a decode step: on a CPU, and on others. On an H200 (0.5B and 7B,
benchmarks/results) 256 take between one step of 64 rows and two of a single row."""


class Allowed(NamedTuple):
    """Masks of a step's rows.

    Attributes:
        bits: of what each may choose; none of a text that is over.
        failed: texts that can't go on, and why.
    """

    bits: UInt32[np.ndarray, "R words"]
    failed: list[tuple[Text, str]]


def allowed(texts: Sequence[Text], rows: int, vocab: int) -> Allowed:
    """What each text may choose next, in the first of so many rows."""
    bits = np.zeros((rows, words(vocab)), np.uint32)
    held = [None if text.over else text.constraint for text in texts]
    kind = next((type(one) for one in held if one is not None), None)
    found = [] if kind is None else kind.fill(held, bits)
    failed = [(text, why) for text, why in zip(texts, found, strict=False) if why is not None]
    return Allowed(bits, failed)


def jump(engine: Engine, texts: Sequence[Text], running: int) -> None:
    """Puts tokens that are known into the cache, behind the one that each text is to choose in the
    step under way, if that is less work; each text notes its own, and goes on behind them.

    Whether it is depends on a text's neighbours, and so a batch-invariant engine never does. Who
    wants log-probabilities needs a step for each token; counts for penalties are the device's.

    Args:
        running: texts that wait meanwhile.
    """
    if engine.shapes.batch_invariant:
        return
    found = [(known, text) for text in texts if (known := _known(text, engine.spec.stop_ids))]
    found.sort(key=lambda pair: -len(pair[0]))
    best, gain = 0, 0.0
    for count in range(1, len(found) + 1):
        saved = sum(len(known) for known, _ in found[:count])
        pieces = [piece for pair in found[:count] for piece in _pieces(*pair, engine)]
        won = saved - running * _cost(engine, pieces)
        if won > gain:
            best, gain = count, won
    chosen = found[:best]
    _enter(engine, [piece for pair in chosen for piece in _pieces(*pair, engine)])
    for known, text in chosen:
        text.jump = known
        text.row[steps.FRESH] = 1
        text.row[steps.TOKEN] = known[-1]
        text.row[steps.GENERATED] = text.given + 1 + len(known)


def _known(text: Text, stop_ids: Sequence[int]) -> list[int]:
    """The tokens that must come behind the next one, as far as the text may go."""
    if text.over or text.constraint is None or text.top is not None:
        return []
    if changes_scores(text.sampling):
        return []
    forced = text.constraint.forced[: text.limit - text.given]
    return list(itertools.takewhile(lambda token: token not in stop_ids, forced))[1:]


def _pieces(known: Sequence[int], text: Text, engine: Engine) -> Iterator[tuple[int, Entering]]:
    """What enters: the next token and those behind it, the last one apart, which is a step's."""
    assert text.constraint is not None
    tokens = [text.constraint.forced[0], *known[:-1]]
    first = text.entering + text.given + 1
    for start, length, padded in pieces_of(first, first + len(tokens), engine.shapes):
        part = tokens[start - first : start - first + length]
        yield padded, Entering(text.pages, start, part)


def _calls(engine: Engine, pieces: Sequence[tuple[int, Entering]]) -> Iterator[tuple[int, int]]:
    """Length and rows of each call of `extend` that puts pieces into the cache."""
    for padded in sorted({padded for padded, _ in pieces}):
        count = sum(padded == other for other, _ in pieces)
        rows = fitting(engine.shapes.pieces, count)
        yield from [(padded, rows)] * -(-count // rows)


def _cost(engine: Engine, pieces: Sequence[tuple[int, Entering]]) -> float:
    """In decode steps."""
    positions = sum(padded * rows for padded, rows in _calls(engine, pieces))
    return positions / POSITIONS.get(engine.platform, MANY_POSITIONS)


def _enter(engine: Engine, pieces: Sequence[tuple[int, Entering]]) -> None:
    left = {padded: [piece for p, piece in pieces if p == padded] for padded, _ in pieces}
    for padded, rows in _calls(engine, pieces):
        taken, left[padded] = left[padded][:rows], left[padded][rows:]
        given = engine.weights, engine.pages, *arrays_of(engine, rows, padded, taken)
        engine.pages = calls.extend(engine.spec.without_tokenizer, *given)
