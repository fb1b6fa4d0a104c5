"""Logs of log-probabilities: JSON lines, a text each, as trainers and servers can write them.

docs/logprobs.md describes the format; the answers of `run.py --top_logprobs` are of it, too.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from qwen_jax import hints, regular_files, strict_json
from qwen_jax.engine.sampling import Sampling
from qwen_jax.errors import UserError
from qwen_jax.experiments import kinds

MOST_VALUES = 5_000_000
"""Values of a file, which as Python's objects take some hundred bytes each."""

LEAST = -1e4
"""Below it stand the ln(0) of some engines, as float16's -65504: a probability no sum can hold."""

SLACK = 1e-2
"""By so much a log-probability may pass 0: rounded ones do, of a normaliser in bfloat16."""

SETTINGS = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
"""What a line may declare of how its text was sampled."""

_FIELDS = ("id", "sample", "prompt", "prompt_tokens", "tokens", "logprobs", "top", *SETTINGS)
_OF_ANSWERS = ("text", "model", "dtype", "sampling", "finish_reason", "top_logprobs")
_ID = kinds.Kind("a text or a whole number", lambda value: type(value) in (str, int))
_TOKEN = kinds.Kind("a token id", lambda value: type(value) is int and 0 <= value < 2**31)
_TOKENS = kinds.list_of(_TOKEN)
_VALUE = kinds.Kind(
    f"a natural logarithm from {LEAST:g} to 0",
    lambda value: kinds.NUMBER.has(value) and LEAST <= value <= SLACK,
)
_PAIR = kinds.Kind(
    "a pair of a token id and its log-probability",
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and _TOKEN.has(value[0])
        and _VALUE.has(value[1])
    ),
)
_TOP = kinds.list_of(_PAIR)


@dataclasses.dataclass(frozen=True)
class Logged:
    """One text of a log.

    Attributes:
        name: its id, with the sample behind it where there are several.
        where: the file and the line, for messages.
        prompt: ids before `tokens`; None where the log leaves them out.
        tokens: ids that the log-probabilities are of.
        logprobs: in nats; NaN where there is none.
        top: at each token, log-probabilities of others by their ids.
        sampling: what the line declares; defaults stand for what it doesn't.
        dtype: in which the engine computed, where the line says it.
    """

    name: str
    where: str
    prompt: tuple[int, ...] | None
    tokens: Int[np.ndarray, "n"]
    logprobs: Float[np.ndarray, "n"]
    top: tuple[Mapping[int, float], ...]
    sampling: Sampling
    dtype: str | None = None

    @property
    def whole(self) -> Int[np.ndarray, "n"]:
        """The prompt's ids, as far as they are known, and the tokens."""
        return np.concatenate([np.asarray(self.prompt or (), np.int64), self.tokens])


def read(path: str | Path) -> dict[str, Logged]:
    """The texts of a log by their names.

    Raises:
        UserError: the file can't be read, is too large or holds no text; a line is no JSON
            object, or one of its fields is missing, misspelt or can't be.
    """
    found: dict[str, Logged] = {}
    values = 0
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        record = strict_json.parse_object(line, where, allow_halves=True)
        if "error" in record and "tokens" not in record:
            continue  # of an answers file: the prompt was refused, and nothing generated
        text = _text(record, where, number)
        if text.name in found:
            raise UserError(
                f"{where} has the id {text.name!r:.60} of {found[text.name].where} again; give "
                "each text one of its own, or a 'sample'."
            )
        found[text.name] = text
        values += len(text.tokens) + sum(map(len, text.top))
        if values > MOST_VALUES:
            raise UserError(
                f"{where}: up to here the file has more than {MOST_VALUES:,} log-probabilities; "
                "split it."
            )
    if not found:
        raise UserError(f"{path} holds no text; write one JSON object a line.")
    return found


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, and their numbers; the last one needs no line break."""
    most = regular_files.MOST_BYTES
    try:
        with regular_files.opened(path) as file:
            number = 0
            while line := file.readline(most + 1):
                number += 1
                if len(line) > most:
                    raise UserError(f"{path}, line {number} has more than {most} bytes; cut it.")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(
            f"--logprobs: {path} can't be read: {regular_files.why_not(error)}"
        ) from error


def _text(record: Mapping[str, Any], where: str, number: int) -> Logged:
    given = {name: value for name, value in record.items() if value is not None}
    for name in given:
        # What is nearly a field was meant to say something.
        if name not in (*_FIELDS, *_OF_ANSWERS) and (meant := hints.meant(name, _FIELDS, 0.85)):
            raise UserError(f"{where} has the field {name!r:.60}; did you mean {meant!r}?")
    given = _plain(given, where)
    optional = {
        "id": _ID,
        "sample": kinds.NATURAL,
        "prompt": _TOKENS,
        "prompt_tokens": kinds.NATURAL,
    }
    needed = {
        "tokens": _TOKENS,
        "logprobs": kinds.list_of(kinds.optional(_VALUE), len(given["tokens"]))
        if isinstance(given.get("tokens"), list)
        else kinds.list_of(kinds.optional(_VALUE)),
    }
    needed |= {name: kind for name, kind in optional.items() if name in given}
    for name, kind in needed.items():
        listed = name in ("prompt", "tokens", "logprobs")
        if listed and isinstance(values := given.get(name), list) and not kind.has(values):
            _blame(name, values, given, where)
    if wrong := kinds.fault(given, needed):
        raise UserError(f"{where}: {wrong}; correct it.")
    top: list[Any] = given.get("top", [[]] * len(given["tokens"]))
    if not isinstance(top, list) or len(top) != len(given["tokens"]):
        raise UserError(
            f"{where}: 'top' is {top!r:.60}, but it must be a list of {len(given['tokens'])} "
            "lists, one a token."
        )
    for at, pairs in enumerate(top):
        if pairs is not None and not _TOP.has(pairs):
            raise UserError(
                f"{where}: 'top' at token {at} is {pairs!r:.60}, but it must be {_TOP.said}."
            )
    name = str(given.get("id", number))
    name += f" (sample {given['sample']})" if given.get("sample") else ""
    prompt = given.get("prompt", None if given.get("prompt_tokens") else [])
    values = [np.nan if value is None else value for value in given["logprobs"]]
    try:
        declared = Sampling(**{name: given[name] for name in SETTINGS if name in given})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Logged(
        name,
        where,
        None if prompt is None else tuple(prompt),
        np.array(given["tokens"], np.int64),
        np.array(values, np.float64),
        tuple(dict(map(tuple, pairs or ())) for pairs in top),
        declared,
        given["dtype"] if isinstance(given.get("dtype"), str) else None,
    )


def _plain(given: dict[str, Any], where: str) -> dict[str, Any]:
    """With the entries of an answer of ours, {"token", "logprob", "top"}, as three columns."""
    entries = given.get("logprobs")
    if not (isinstance(entries, list) and entries and isinstance(entries[0], dict)):
        return given
    for at, entry in enumerate(entries):
        if not isinstance(entry, dict) or not entry.keys() >= {"token", "logprob"}:
            raise UserError(
                f"{where}: 'logprobs' at {at} is {entry!r:.60}, but it must have 'token' and "
                "'logprob', as those before it."
            )
    return given | {
        "tokens": [entry["token"] for entry in entries],
        "logprobs": [entry["logprob"] for entry in entries],
        "top": [entry.get("top") for entry in entries],
    }


def _blame(name: str, values: list[Any], given: Mapping[str, Any], where: str) -> None:
    """Raises UserError for the first of many values that can't be, or their number."""
    kind = kinds.optional(_VALUE) if name == "logprobs" else _TOKEN
    for at, value in enumerate(values):
        if not kind.has(value):
            raise UserError(
                f"{where}: {name!r} at {at} is {value!r:.60}, but it must be {kind.said}; "
                + ("write null where there is none." if name == "logprobs" else "correct it.")
            )
    raise UserError(
        f"{where}: {name!r} has {len(values)} values for {len(given['tokens'])} tokens; write one "
        "a token, null where there is none."
    )
