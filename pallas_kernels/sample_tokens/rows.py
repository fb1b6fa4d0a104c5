"""What rows ask of `sample_tokens`, and what they get: data, so one program serves all of it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32
from numpy.typing import ArrayLike


class Settings(NamedTuple):
    """One number a row of each; `settings` makes them of the numbers users write.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise scores are divided by it.
        top_k: keep the k likeliest tokens and all tied with the last; 0 keeps all.
        tail: 1 - top_p, from float64: 0 keeps all.
        floor: log(min_p), from float64: -inf keeps all.
        repetition: divides positive and multiplies negative scores of tokens in the text.
        presence, frequency: subtracted from scores of generated tokens, once and once each time.
        biased, masked: whether the row's bias and its mask of allowed tokens are read.
        seed: with the number of tokens so far it decides the draw.
        logprobs: how many of the likeliest tokens are reported, with the chosen one's
            log-probability; -1 for neither.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    tail: Float[Array, "B"]
    floor: Float[Array, "B"]
    repetition: Float[Array, "B"]
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    biased: Int[Array, "B"]
    masked: Int[Array, "B"]
    seed: UInt32[Array, "B"]
    logprobs: Int[Array, "B"]


def settings(
    rows: int,
    *,
    temperature: ArrayLike = 0.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    repetition: ArrayLike = 1.0,
    presence: ArrayLike = 0.0,
    frequency: ArrayLike = 0.0,
    biased: ArrayLike = 0,
    masked: ArrayLike = 0,
    seed: ArrayLike = 0,
    logprobs: ArrayLike = -1,
) -> Settings:
    """On the host: each a number for all rows, or one for each."""

    def column(values: ArrayLike, dtype: type) -> Any:  # an array of JAX's as soon as it is used
        return np.full(rows, np.asarray(values, dtype), dtype)

    with np.errstate(divide="ignore"):
        floor = np.log(np.asarray(min_p, np.float64))
    return Settings(
        column(temperature, np.float32),
        column(top_k, np.int32),
        column(1 - np.asarray(top_p, np.float64), np.float32),
        column(floor, np.float32),
        column(repetition, np.float32),
        column(presence, np.float32),
        column(frequency, np.float32),
        column(biased, np.int32),
        column(masked, np.int32),
        column(seed, np.uint32),
        column(logprobs, np.int32),
    )


class Counts(NamedTuple):
    """The tokens of each row so far.

    Attributes:
        seen: a bit for every token that stands in the prompt or was generated, token t's bit
            t % 32 of word t // 32: all that a repetition penalty reads, 1/32 of the logits.
        generated: how many times each was generated; read only where `seen` says so and a row
            has a presence or frequency penalty.
    """

    seen: UInt32[Array, "B words"]
    generated: Int[Array, "B V"]


def count(counts: Counts, token: Int[Array, "B"], live: Bool[Array, "B"]) -> Counts:
    """With the tokens that live rows chose."""
    row, word = jnp.arange(len(token)), token >> 5
    bit = live.astype(jnp.uint32) << (token & 31).astype(jnp.uint32)
    seen = counts.seen.at[row, word].set(counts.seen[row, word] | bit)
    return Counts(seen, counts.generated.at[row, token].add(live))


class Logprobs(NamedTuple):
    """The model's own log-probabilities, before any processing, where a row asked for them.

    Attributes:
        chosen: the chosen token's; -inf in other rows.
        top_ids, top: the likeliest tokens, of equal ones the lowest ids first; -1 and -inf from
            the number on that the row asked for.
    """

    chosen: Float[Array, "B"]
    top_ids: Int[Array, "B top"]
    top: Float[Array, "B top"]


class Choice(NamedTuple):
    """One token a row.

    Attributes:
        token: -1, which is no token, where every token is banned.
        banned: every token of the row is, by bias or mask.
        finite: the model's largest logit is a finite number; otherwise the token means nothing.
        logprobs: `sample_tokens` always gives them; None where a caller has no use for them.
    """

    token: Int[Array, "B"]
    banned: Bool[Array, "B"]
    finite: Bool[Array, "B"]
    logprobs: Logprobs | None


def words(vocab: int) -> int:
    """Of a mask with a bit a token."""
    return -(-vocab // 32)


def pack(rows: Sequence[Sequence[int] | np.ndarray], vocab: int) -> np.ndarray:
    """A mask a row with the bits of these tokens set, uint32 `[rows, words]`; on the host."""
    bits = np.zeros((len(rows), words(vocab) * 32), np.uint8)
    for row, tokens in enumerate(rows):
        bits[row, np.asarray(tokens, int)] = 1
    return np.packbits(bits, axis=1, bitorder="little").view("<u4")
