"""Logs of log-probabilities made from logits by formulas of their own, with mistakes in them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import scipy.special
from ml_dtypes import bfloat16

from qwen_jax.accuracy.logprobs.reading import Logged
from qwen_jax.engine.sampling import Sampling

Row = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""From logits after a position, ids up to there and the prompt's length to log-probabilities."""


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(bfloat16).astype(np.float64)


def plain(z: np.ndarray, seen: np.ndarray, prompt: int) -> np.ndarray:
    return z - scipy.special.logsumexp(z)


def hot(temperature: float, then: Row = plain) -> Row:
    return lambda z, seen, prompt: then(z / temperature, seen, prompt)


def top_p(p: float) -> Row:
    """The likeliest tokens whose probabilities reach p, one by one."""

    def row(z: np.ndarray, seen: np.ndarray, prompt: int) -> np.ndarray:
        probs, kept, total = scipy.special.softmax(z), [], 0.0
        for token in np.argsort(-z):
            if total >= p:
                break
            kept.append(token)
            total += probs[token]
        out = np.full(len(z), -np.inf)
        out[kept] = plain(z[kept], seen, prompt)
        return out

    return row


def top_k(k: int) -> Row:
    def row(z: np.ndarray, seen: np.ndarray, prompt: int) -> np.ndarray:
        return plain(np.where(z >= np.sort(z)[-k], z, -np.inf), seen, prompt)

    return row


def repetition(penalty: float) -> Row:
    def row(z: np.ndarray, seen: np.ndarray, prompt: int) -> np.ndarray:
        z = z.copy()
        for token in set(seen.tolist()):
            z[token] = z[token] / penalty if z[token] > 0 else z[token] * penalty
        return plain(z, seen, prompt)

    return row


def frequency(penalty: float) -> Row:
    def row(z: np.ndarray, seen: np.ndarray, prompt: int) -> np.ndarray:
        z = z.copy()
        for token in seen[prompt:]:
            z[token] -= penalty
        return plain(z, seen, prompt)

    return row


def padded(rows: int) -> Row:
    return lambda z, seen, prompt: plain(np.append(z, np.zeros(rows)), seen, prompt)


def logits_rounded(then: Row = plain) -> Row:
    return lambda z, seen, prompt: then(to_bfloat16(z), seen, prompt)


def rounded(first: Row = plain) -> Row:
    return lambda z, seen, prompt: to_bfloat16(first(z, seen, prompt))


def stepwise(z: np.ndarray, seen: np.ndarray, prompt: int) -> np.ndarray:
    """A log-softmax whose every result is kept in bfloat16."""
    shifted = to_bfloat16(z - z.max())
    total = to_bfloat16(to_bfloat16(np.exp(shifted)).sum())
    return to_bfloat16(shifted - to_bfloat16(np.log(total)))


def values(
    logits: np.ndarray, ids: np.ndarray, prompt: int, row: Row = plain, token: int = 1
) -> np.ndarray:
    """Of every id after the prompt, where `row` is of the position before it; with `token` 0 the
    position is its own."""
    found = []
    for at in range(prompt, len(ids)):
        place = at - token
        found.append(row(logits[place].astype(np.float64), ids[: place + 1], prompt)[ids[at]])
    return np.array(found)


def logged(
    name: str, ids: np.ndarray, prompt: int, logprobs: np.ndarray, sampling: Sampling | None = None
) -> Logged:
    return Logged(
        name,
        f"log, {name}",
        tuple(ids[:prompt].tolist()),
        ids[prompt:],
        np.where(np.isinf(logprobs), np.nan, logprobs),
        ({},) * (len(ids) - prompt),
        sampling or Sampling(),
    )


def write(path: Path, log: Mapping[str, Logged]) -> Path:
    """As a trainer would."""
    lines = [
        {
            "id": text.name,
            "prompt": text.prompt,
            "tokens": text.tokens.tolist(),
            "logprobs": [None if np.isnan(x) else x for x in text.logprobs.tolist()],
        }
        for text in log.values()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
