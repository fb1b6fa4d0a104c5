"""Engines by their logs alone: log-probabilities, or tokens that were chosen greedily.

Nothing between the tokens and their probabilities was recorded, so each text is held against the
whole forward pass in float64, with every operation's bound carried through all that follow it
(docs/certificate.md). In float32 that is some thousandths of a nat; in narrower dtypes it may allow
anything, and then nothing is said. A log that is past it is explained by the causes that
`compare --logprobs` knows, where one brings every value within these bounds; of one within it those
are listed that do as well as none.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qwen_jax import choices
from qwen_jax.accuracy.certificate import log_causes
from qwen_jax.accuracy.certificate.contents import (
    Engine,
    Judged,
    LogDifference,
    Named,
    NotCovered,
    Parting,
)
from qwen_jax.accuracy.certificate.log_causes import Derived
from qwen_jax.accuracy.certificate.told_apart import Open
from qwen_jax.accuracy.exact import carried
from qwen_jax.accuracy.exact.bounds import Arithmetic
from qwen_jax.accuracy.exact.carried import Bounded
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.exact.replay import compare, first_position
from qwen_jax.accuracy.exact.rounding import UNIT
from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.logprobs.audit import half_step, with_prompt
from qwen_jax.accuracy.logprobs.causes import MILDEST_TOP_P
from qwen_jax.accuracy.logprobs.figures import paired
from qwen_jax.accuracy.logprobs.reading import Logged, read
from qwen_jax.errors import UserError
from qwen_jax.loading import read_tokenizer
from qwen_jax.weights.loader import Checkpoint

Log = Mapping[str, Logged]
Truth = Callable[[tuple[int, ...], str], Bounded]
"""From a text's ids and a dtype to the logits after each of them, and their bounds."""

DTYPES = tuple(name for name in choices.DTYPES if name != "auto")
VAGUE = -math.log(MILDEST_TOP_P) / 2
"""Nats: the mildest filter in common use moves a log-probability by twice as much. With bounds as
wide a value may lie within that of an engine with it and within that of one without."""


def is_log(path: str | Path) -> bool:
    return str(path).endswith(".jsonl")


def judged_logs(
    files: Sequence[str], checkpoint: Checkpoint, dtype: str | None, progress: Progress | None
) -> tuple[tuple[Engine, ...], LogDifference | None]:
    """Each log as an engine, and between two what they differ by.

    Args:
        files: one or two.
        dtype: in which an engine computed whose log doesn't say it.

    Raises:
        UserError: a log can't be read, doesn't fit the model, or has nothing that can be judged.
    """
    logs = [read(file) for file in files]
    both = paired(logs[0], logs[1], (files[0], files[1])) if len(logs) == 2 else None
    dtypes = [_dtype(file, log, dtype) for file, log in zip(files, logs, strict=True)]
    truth = _truth_of(checkpoint)
    names = list(dict.fromkeys(name for log in logs for name in log))
    judged: list[dict[str, Judged]] = [{} for _ in logs]
    skipped: list[dict[str, str]] = [{} for _ in logs]
    digits = [half_step(log) for log in logs]
    measures = [_measure(truth, of, checkpoint) for of in dtypes]
    wholes = [{name: with_prompt(log[name], logs, name) for name in log} for log in logs]
    left_open = [
        Open(whole.values(), measure, half)
        for whole, measure, half in zip(wholes, measures, digits, strict=True)
    ]
    for done, name in enumerate(names, 1):
        for number, whole in enumerate(wholes):
            if name not in whole:
                continue
            text = whole[name]
            found = _judged(text, dtypes[number], digits[number], truth, checkpoint)
            if isinstance(found, str):
                skipped[number][name] = found
            else:
                judged[number][name] = found
                if found.fraction <= 1 and _has_values(text):
                    left_open[number].see(text)
        if progress:
            progress(done, len(names))
    engines = []
    for number, whole in enumerate(wholes):
        of = judged[number], skipped[number]
        causes = _causes(whole, judged[number], measures[number], digits[number], progress)
        engine = _engine(files[number], dtypes[number], *of, causes)
        if engine.verdict == "certified":
            engine = dataclasses.replace(engine, not_told=left_open[number].moves)
        engines.append(engine)
    if both is None:
        return tuple(engines), None
    same, others = both
    errors = np.concatenate([np.zeros(0), *(np.abs(np.subtract(*pair.values)) for pair in same)])
    return tuple(engines), LogDifference(
        texts=len(same),
        values=len(errors),
        largest=float(errors.max(initial=0.0)),
        rms=float(np.sqrt(np.mean(errors**2))) if len(errors) else 0.0,
        parted=len(others),
        parting=next(
            (
                parting
                for one, other in others
                if (parting := _parting(with_prompt(one, logs, one.name), other, dtypes[0], truth))
            ),
            None,
        ),
    )


def _dtype(file: str, log: Log, given: str | None) -> str:
    said = {text.dtype for text in log.values()}
    if len(said) > 1:
        raise UserError(
            f"{file}: its lines name several dtypes, {', '.join(map(repr, said))}; split it, for "
            "one log is of one engine."
        )
    (dtype,) = said
    if dtype is None and given is None:
        raise UserError(
            f"{file} doesn't say in what its engine computed; add --dtype={'|'.join(DTYPES)}, or "
            "'dtype' to its lines."
        )
    found = dtype or given
    if found not in DTYPES:
        raise UserError(f"{file}: 'dtype' is {found!r:.40}, but must be {', '.join(DTYPES)}.")
    return found


def _truth_of(checkpoint: Checkpoint) -> Truth:
    @functools.lru_cache(maxsize=2)  # two logs of one text, which comes twice in a row
    def truth(ids: tuple[int, ...], dtype: str) -> Bounded:
        unit = UNIT[dtype]
        arithmetic = Arithmetic(storage=unit, cache=unit, scores=unit)
        source = CheckpointSource(checkpoint, dtype)
        return carried.logits(source, np.asarray(ids), arithmetic)

    return truth


def _judged(
    text: Logged, dtype: str, digits: float, truth: Truth, checkpoint: Checkpoint
) -> Judged | str:
    """A text, or why nothing can be said of it."""
    if text.prompt is None:
        return "has no prompt's ids ('prompt')"
    ids, first = text.whole, len(text.prompt)
    config = checkpoint.config
    if ids.max(initial=0) >= config.vocab_size:
        raise UserError(
            f"{text.where}: it has the id {ids.max()}, but the model's last one is "
            f"{config.vocab_size - 1}; name the model that computed it with --model."
        )
    if len(ids) > config.context_length:
        raise UserError(
            f"{text.where}: it has {len(ids)} tokens, but the model's context "
            f"{config.context_length}; cut it."
        )
    has_values = _has_values(text)
    if not has_values and text.sampling.temperature > 0:
        return "has no log-probabilities, and its tokens were drawn"
    # Before the first token of all nothing is predicted.
    rows = np.arange(max(first, 1), len(ids)) - 1
    if not len(rows):
        return "has no token with anything before it"
    logits, limits = (x[rows] for x in truth(tuple(ids.tolist()), dtype))
    if not np.isfinite(logits).all():
        raise UserError(
            f"{text.where}: the model's own logits are not finite here, so nothing can be told; "
            "check its weights."
        )
    tokens = ids[rows + 1]
    if has_values:
        what = "log-probabilities"
        four = _values(text, rows + 1 - first, logits, limits, UNIT[dtype], digits)
    else:
        what, four = "greedy choices", _choices(tokens, logits, limits)
    at, found, expected, limit = four
    if not len(at):
        return "has no log-probability behind a first token"
    residual = compare(found, expected, limit)
    resolution = float(limit.max())
    if not resolution < VAGUE and residual.within:
        return (
            f"has bounds of up to {resolution:.2g} nats in {dtype}, where {VAGUE:.2g} would show a "
            f"top-p of {MILDEST_TOP_P}"
        )
    worst = residual.worst[0] if residual.within else first_position(found, expected, limit)
    return Judged(
        tensor=f"{what} of {text.name}",
        layer=None,
        position=int(rows[at[worst]] + 1),
        fraction=residual.ratio,
        resolution=resolution,
        together=("the whole forward pass",),
        values=len(at),
        dtype=dtype,
    )


def _has_values(text: Logged) -> bool:
    return bool((~np.isnan(text.logprobs)).any() or any(text.top))


Compared = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Rows, what the log has there, what it should be, and the bound of their difference."""


def _values(
    text: Logged,
    tokens: np.ndarray,
    logits: np.ndarray,
    limits: np.ndarray,
    unit: float,
    digits: float,
) -> Compared:
    """All log-probabilities, of the tokens and of others beside them."""
    pairs = [
        (row, token, value)
        for row, at in enumerate(tokens.tolist())
        for token, value in [(int(text.tokens[at]), text.logprobs[at]), *text.top[at].items()]
        if not np.isnan(value) and 0 <= token < logits.shape[1]
    ]
    rows, ids = (np.array([pair[i] for pair in pairs], np.int64) for i in range(2))
    expected, limit = (x[rows, ids] for x in carried.log_softmax(logits, limits, unit))
    found = np.array([pair[2] for pair in pairs], np.float64)
    return rows, found, expected, limit + digits


def _choices(tokens: np.ndarray, logits: np.ndarray, limits: np.ndarray) -> Compared:
    """Each token beside the likeliest: by how much it falls short, where nothing should."""
    rows = np.arange(len(tokens))
    top = logits.argmax(axis=1)
    short = logits[rows, top] - logits[rows, tokens]
    return rows, short, np.zeros(len(rows)), limits[rows, top] + limits[rows, tokens]


def _causes(
    log: Log,
    judged: Mapping[str, Judged],
    measure: Derived,
    digits: float,
    progress: Progress | None,
) -> tuple[Named, ...]:
    """Of a log that is past its bounds somewhere, where these are fine enough to tell causes."""
    wrong = any(one.fraction > 1 for one in judged.values())
    if not wrong or not all(one.resolution < VAGUE for one in judged.values()):
        return ()
    return log_causes.named(log, measure, digits, progress)


def _measure(truth: Truth, dtype: str, checkpoint: Checkpoint) -> Derived:
    try:
        stops = tuple(read_tokenizer(checkpoint).stop_ids)
    except UserError:  # ids need no tokenizer; then no token of its own can stand before them
        stops = ()
    return Derived(lambda ids: truth(ids, dtype), stops, UNIT[dtype])


def _parting(one: Logged, other: Logged, dtype: str, truth: Truth) -> Parting | None:
    """Where two texts of one prompt part, and how far apart the model has the two tokens."""
    least = min(len(one.tokens), len(other.tokens))
    parts = np.flatnonzero(one.tokens[:least] != other.tokens[:least])
    if one.prompt is None or not len(parts):
        return None
    at = int(parts[0])
    ids = one.whole[: len(one.prompt) + at]
    if not len(ids):
        return None
    logits, limits = (x[-1] for x in truth(tuple(ids.tolist()), dtype))
    both = int(one.tokens[at]), int(other.tokens[at])
    apart, limit = abs(logits[both[0]] - logits[both[1]]), limits[both[0]] + limits[both[1]]
    return Parting(one.name, len(ids), both, float(apart), float(limit))


def _engine(
    file: str,
    dtype: str,
    judged: Mapping[str, Judged],
    skipped: dict[str, str],
    causes: tuple[Named, ...],
) -> Engine:
    if not judged:
        name, why = next(iter(skipped.items()))
        raise UserError(
            f"{file}: no certificate, for nothing in it can be judged: the text {name!r:.40} "
            f"{why}; dump tensors and certify those, or ask `compare --logprobs`, which measures "
            "what rounding makes."
        )
    every = list(judged.values())
    wrong = tuple(one for one in every if one.fraction > 1)
    return Engine(
        dump=file,
        tokens=(),
        declared={
            "implementation": "by its log",
            "device": "unknown",
            "dtype": dtype,
            "activation_dtype": dtype,
        },
        values=sum(one.values for one in every),
        largest=max(every, key=lambda one: one.fraction),
        coarsest=max(every, key=lambda one: one.resolution),
        first=wrong[0] if wrong else None,
        causes=causes,
        unexplained=() if causes else wrong,
        not_covered=NotCovered((), (), skipped),
        tensors=tuple(every),
        not_told={},
    )
