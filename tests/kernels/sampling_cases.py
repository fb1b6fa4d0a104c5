"""Rows that ask `sample_tokens` for everything, and what may differ from the definition."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sample_tokens import Choice, Counts, Settings, pack, settings
from pallas_kernels.sample_tokens.reference import gumbel, keep, process, reference

TIE = 2e-5
"""Scores with noise that differ by less are the same to float32: the kernel's logarithms are good
to 1e-6, and scores of 100 to 8e-6."""


class Case(NamedTuple):
    """What `sample_tokens` takes."""

    logits: np.ndarray
    settings: Settings
    step: np.ndarray
    bias: np.ndarray | None
    counts: Counts | None
    allowed: np.ndarray | None
    valid_tokens: int

    def keywords(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("valid_tokens", "bias", "counts", "allowed")}


def peaked(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Like a model's: most tokens unlikely, a few likely."""
    logits = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    for row in logits:
        few = rng.choice(vocab, 8, replace=False)
        row[few] += rng.uniform(4, 16, 8).astype(np.float32)
    return logits


def flat(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    return rng.normal(0, 0.5, (rows, vocab)).astype(np.float32)


def tied(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """A handful of values, zero of both signs among them."""
    return (rng.integers(-3, 4, (rows, vocab)) * np.float32(-0.5)).astype(np.float32)


def constant(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    return np.full((rows, vocab), -1.25, np.float32)


LOGITS = {"peaked": peaked, "flat": flat, "tied": tied, "constant": constant}

# name -> its draw for some rows
ASKED: dict[str, Any] = {
    "greedy": lambda rng, n: {"temperature": 0},
    "temperature": lambda rng, n: {},
    "top_k": lambda rng, n: {"top_k": rng.integers(1, 100, n)},
    "large top_k": lambda rng, n: {"top_k": rng.integers(100, 2000, n)},
    "top_p": lambda rng, n: {"top_p": rng.uniform(0.05, 1, n)},
    "high top_p": lambda rng, n: {"top_p": 1 - 10.0 ** -rng.integers(2, 6, n)},
    "low top_p": lambda rng, n: {"top_p": 1e-30},
    "min_p": lambda rng, n: {"min_p": rng.uniform(0, 0.5, n)},
    "qwen": lambda rng, n: {
        "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition": 1.05,
    },
    "all": lambda rng, n: {
        "top_k": rng.integers(1, 500, n), "top_p": rng.uniform(0.3, 1, n),
        "min_p": rng.uniform(0, 0.1, n), "repetition": rng.uniform(0.8, 1.5, n),
        "presence": rng.normal(0, 1, n), "frequency": rng.normal(0, 1, n),
    },
}  # fmt: skip


def mixed(rng: np.random.Generator, rows: int, **fixed: Any) -> Settings:
    """Rows of which each asks for something else."""
    columns: dict[str, np.ndarray] = {
        "temperature": rng.uniform(0.3, 2, rows),
        "seed": rng.integers(0, 2**32, rows),
        "logprobs": rng.integers(-1, 21, rows),
        "biased": rng.integers(0, 2, rows),
        "masked": rng.integers(0, 2, rows),
    }
    neutral = {"top_p": 1.0, "repetition": 1.0}
    names = list(ASKED)
    for row in range(rows):
        for name, value in ASKED[names[row % len(names)]](rng, rows).items():
            column = columns.setdefault(name, np.full(rows, neutral.get(name, 0.0)))
            column[row] = np.broadcast_to(value, rows)[row]
    return settings(rows, **columns, **fixed)


def drawn(rng: np.random.Generator, kind: str, rows: int, vocab: int) -> Case:
    """Rows that ask for everything, a row of which few tokens are allowed among them."""
    logits = LOGITS[kind](rng, rows, vocab)
    texts = [rng.integers(0, vocab, 60) for _ in range(rows)]
    generated = np.zeros((rows, vocab), np.int32)
    for row, text in enumerate(texts):
        np.add.at(generated[row], text[rng.integers(0, 20, 40)], 1)
    allowed = rng.random((rows, vocab)) < 0.9
    allowed[0] = True
    allowed[1 % rows] = rng.random(vocab) < 30 / vocab
    asked = mixed(rng, rows)
    asked.masked[:2] = 1
    bias = np.where(rng.random((rows, vocab)) < 0.01, rng.normal(0, 5, (rows, vocab)), 0)
    bias[rng.random((rows, vocab)) < 0.01] = -np.inf
    return Case(
        logits,
        asked,
        rng.integers(0, 1000, rows).astype(np.int32),
        bias.astype(np.float32),
        Counts(pack(texts, vocab), generated),
        pack([np.flatnonzero(a) for a in allowed], vocab),
        vocab - vocab // 500,
    )


def defined(case: Case, top_logprobs: int = 20) -> Choice:
    return jax.device_get(_reference(*case, top_logprobs))


_reference = jax.jit(reference, static_argnums=(6, 7))


@jax.jit
def _noisy(case: Case) -> jax.Array:
    """Scores with noise, -inf where filters remove a token."""
    logits, settings, step, bias, counts, allowed, valid = case
    own = jnp.where(jnp.arange(logits.shape[1]) < valid, logits, -jnp.inf)
    scores = process(own, settings, bias, counts, allowed)
    hot = scores / jnp.where(settings.temperature > 0, settings.temperature, 1)[:, None]
    ids = jnp.broadcast_to(jnp.arange(logits.shape[1]), logits.shape)
    kept = keep(hot, ids, settings)
    kept &= hot - hot.max(axis=1, keepdims=True) >= settings.floor[:, None]
    return jnp.where(kept, hot + gumbel(settings.seed, step, ids), -jnp.inf)


def assert_chosen(choice: Choice, case: Case, expected: Choice | None = None) -> int:
    """The same token as the definition, or one whose score is tied; how many were tied."""
    right = expected or defined(case)
    np.testing.assert_array_equal(choice.finite, right.finite)
    np.testing.assert_array_equal(choice.banned, right.banned)
    others = np.flatnonzero(np.asarray(choice.token) != right.token)
    if len(others):
        noisy = np.asarray(_noisy(case))
        for row in others:
            assert case.settings.temperature[row] > 0, f"row {row}, greedy"
            best = noisy[row].max()
            found = noisy[row, choice.token[row]]
            assert best - found <= TIE * max(1, abs(best)), (
                f"row {row}: {choice.token[row]} of {found}, not {right.token[row]} of {best}"
            )
    np.testing.assert_array_equal(choice.logprobs.top_ids, right.logprobs.top_ids)
    close = {"rtol": 0, "atol": 2e-5}
    np.testing.assert_allclose(choice.logprobs.top, right.logprobs.top, **close)
    same = np.asarray(choice.token) == right.token
    np.testing.assert_allclose(choice.logprobs.chosen[same], right.logprobs.chosen[same], **close)
    return len(others)
