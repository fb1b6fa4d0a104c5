"""The definition of correct for `sample_tokens`, in plain jnp.

Nothing is sorted: the k-th largest score, the score down to which tokens reach p, and the id down
to which equal scores do, are each the largest number t for which the weights of numbers from t on
sum to enough; `largest` finds its bits from the highest on. A pass over 151,936 scores takes a
CPU 0.1 ms, so that filters cost 3 ms a row where a sort takes 45. Probabilities are float64.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from pallas_kernels.sample_tokens.noise import threefry
from pallas_kernels.sample_tokens.rows import Choice, Counts, Logprobs, Settings

BELOW_ONE = 1 - 2.0**-24
FEW = 128
"""Candidates that a row with a small top-k is drawn from, in place of the whole vocabulary."""


def reference(
    logits: Float[Array, "B V"],
    settings: Settings,
    step: Int[Array, "B"],
    bias: Float[Array, "B V"] | None,
    counts: Counts | None,
    allowed: UInt32[Array, "B words"] | None,
    valid_tokens: int,
    top_logprobs: int,
    draws: bool = True,
) -> Choice:
    own = jnp.where(jnp.arange(logits.shape[-1]) < valid_tokens, logits, -jnp.inf)
    scores = process(own, settings, bias, counts, allowed)
    likeliest = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    token = likeliest
    if draws:
        token = lax.cond(
            (settings.temperature > 0).any(),
            lambda: jnp.where(settings.temperature > 0, draw(scores, settings, step), likeliest),
            lambda: likeliest,
        )
    # Not by the largest alone: a maximum over many numbers may leave out a NaN.
    finite = (own < jnp.inf).all(axis=-1) & (own > -jnp.inf).any(axis=-1)
    banned = jnp.isneginf(scores.max(axis=-1)) & finite
    token = jnp.where(banned, -1, token)
    asked = settings.logprobs >= 0
    nothing = Logprobs(
        jnp.full(token.shape, -jnp.inf),
        jnp.full((*token.shape, top_logprobs), -1, jnp.int32),
        jnp.full((*token.shape, top_logprobs), -jnp.inf),
    )

    def logprobs() -> Logprobs:
        each = jax.nn.log_softmax(own, axis=-1)
        top, ids = lax.top_k(each, top_logprobs)
        chosen = jnp.take_along_axis(each, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0]
        wanted = (jnp.arange(top_logprobs) < settings.logprobs[:, None]) & (top > -jnp.inf)
        return Logprobs(
            jnp.where(asked & ~banned, chosen, nothing.chosen),
            jnp.where(wanted, ids, nothing.top_ids),
            jnp.where(wanted, top, nothing.top),
        )

    return Choice(token, banned, finite, lax.cond(asked.any(), logprobs, lambda: nothing))


def bits(mask: UInt32[Array, "B words"], vocab: int) -> Bool[Array, "B V"]:
    """Of every token."""
    each = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return each.reshape(len(mask), -1)[:, :vocab].astype(bool)


def process(
    scores: Float[Array, "B V"],
    settings: Settings,
    bias: Float[Array, "B V"] | None,
    counts: Counts | None,
    allowed: UInt32[Array, "B words"] | None,
) -> Float[Array, "B V"]:
    """Bias, repetition penalty, presence and frequency penalties; -inf where not allowed."""
    vocab = scores.shape[-1]

    def where_any(asks: Bool[Array, "B"], change: Any, scores: Any) -> Any:
        changed = lambda: jnp.where(asks[:, None], change(scores), scores)  # noqa: E731
        return lax.cond(asks.any(), changed, lambda: scores)

    if bias is not None:
        scores = where_any(settings.biased != 0, lambda x: x + bias, scores)
    if counts is not None:
        scores = where_any(penalised(settings), lambda x: penalise(x, settings, counts), scores)
    if allowed is not None:
        scores = where_any(
            settings.masked != 0, lambda x: jnp.where(bits(allowed, vocab), x, -jnp.inf), scores
        )
    return scores


def penalised(settings: Settings) -> Bool[Array, "B"]:
    return (settings.repetition != 1) | (settings.presence != 0) | (settings.frequency != 0)


def penalise(
    scores: Float[Array, "B V"], settings: Settings, counts: Counts
) -> Float[Array, "B V"]:
    """Repetition penalty (Keskar et al., 2019), then presence and frequency penalties."""
    factor = settings.repetition[:, None]
    lowered = jnp.where(scores > 0, scores / factor, scores * factor)
    scores = jnp.where(bits(counts.seen, scores.shape[-1]), lowered, scores)
    scores = scores - settings.presence[:, None] * (counts.generated > 0)
    return scores - settings.frequency[:, None] * counts.generated


def draw(scores: Float[Array, "B V"], settings: Settings, step: Int[Array, "B"]) -> Int[Array, "B"]:
    """A token for every row, as likely as its probability among those that are kept."""
    vocab, draws = scores.shape[-1], settings.temperature > 0
    hot = scores / jnp.where(draws, settings.temperature, 1)[:, None]
    everything = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), hot.shape)
    if vocab <= FEW:
        return pick(hot, everything, settings, step)
    # The barrier keeps XLA from seeing a sort in it.
    # The other way round: XLA 0.10.2 ends the process where, for several devices, a barrier has
    # top_k's own tuple.
    ids, few = lax.optimization_barrier(lax.top_k(hot, FEW)[::-1])
    last = jnp.clip(settings.top_k, 1, FEW) - 1
    kth = jnp.take_along_axis(few, last[:, None], axis=-1)[:, 0]
    # All tokens that top-k keeps are among these.
    enough = (settings.top_k > 0) & (settings.top_k < FEW) & (few[:, -1] < kth)
    return lax.cond(
        (enough | ~draws).all(),
        lambda: pick(few, ids, settings, step),
        lambda: pick(hot, everything, settings, step),
    )


def pick(
    hot: Float[Array, "B C"], ids: Int[Array, "B C"], settings: Settings, step: Int[Array, "B"]
) -> Int[Array, "B"]:
    """A token of every row from candidates, outside of which top-k keeps none."""
    filters = (settings.top_k > 0) | (settings.tail > 0)
    kept = lax.cond(
        (filters & (settings.temperature > 0)).any(),
        lambda: keep(hot, ids, settings),
        lambda: jnp.ones(hot.shape, bool),
    )
    # p_i < min_p * p_max, in logits, so that no softmax is needed.
    kept &= hot - hot.max(axis=-1, keepdims=True) >= settings.floor[:, None]
    noisy = jnp.where(kept, hot + gumbel(settings.seed, step, ids), -jnp.inf)
    best = jnp.argmax(noisy, axis=-1, keepdims=True)
    return jnp.take_along_axis(ids, best, axis=-1)[:, 0]


def gumbel(
    seed: UInt32[Array, "B"], step: Int[Array, "B"], ids: Int[Array, "B C"]
) -> Float[Array, "B C"]:
    """A draw from the Gumbel distribution for every token: the likeliest of scores with it added
    is a draw from their softmax."""
    pairs = (ids >> 1).astype(jnp.uint32)
    even, odd = threefry(seed[:, None], step.astype(jnp.uint32)[:, None], pairs)
    each = jnp.where(ids & 1, odd, even).astype(jnp.float32)
    # Fine near 0, where the largest draws come from.
    uniform = jnp.minimum(each * 2.0**-32 + 2.0**-33, BELOW_ONE)
    return -jnp.log(-jnp.log1p(-uniform))


def keep(
    hot: Float[Array, "B C"], ids: Int[Array, "B C"], settings: Settings
) -> Bool[Array, "B C"]:
    """Top-k, then top-p of what is left.

    Top-p removes tokens in ascending order, of equal ones the lowest id first, as long as the
    probability of all that are removed is at most 1 - p, and never the last. That is
    transformers' rule; its sort is not stable, so that of equal tokens it keeps as many, but any.
    """
    keys, count = ordered(hot), hot.shape[-1]
    k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, count), count)
    kth = largest(keys, jnp.ones(hot.shape, jnp.int32), k)
    kept = keys >= kth[:, None]
    with jax.enable_x64(True):
        tail = settings.tail.astype(jnp.float64)
        wide = hot.astype(jnp.float64)
        weights = jnp.where(kept, jnp.exp(wide - wide.max(axis=-1, keepdims=True)), 0)
        total = weights.sum(axis=-1)
        last = jnp.minimum(largest(keys, weights, total * (1 - tail)), keys.max(axis=-1))
        tied = keys == last[:, None]
        there = tied.sum(axis=-1, dtype=jnp.int32)
        below = jnp.where(keys < last[:, None], weights, 0).sum(axis=-1)
        one = jnp.where(tied, weights, 0).max(axis=-1)
        removed = jnp.floor((total * tail - below) / one)
        left = there - jnp.clip(removed, 0, there - 1).astype(jnp.int32)
    places = jnp.where(tied, ids, 0).astype(jnp.uint32)
    first = largest(places, tied.astype(jnp.int32), left)
    reaches = (keys > last[:, None]) | (tied & (places >= first[:, None]))
    return kept & (reaches | (settings.tail == 0)[:, None])


def ordered(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Integers in the same order, with both zeroes the same."""
    pattern = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    negative = pattern >> 31 != 0
    return jnp.where(negative, ~pattern, pattern | jnp.uint32(1 << 31))


def largest(
    keys: UInt32[Array, "B V"], weights: Num[Array, "B V"], need: Num[Array, "B"]
) -> UInt32[Array, "B"]:
    """The largest t of each row for which the weights of keys from t on sum to `need` or more."""

    def turn(i: Any, found: UInt32[Array, "B"]) -> UInt32[Array, "B"]:
        higher = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        inside = keys >= higher[:, None]
        enough = jnp.where(inside, weights, 0).sum(axis=-1, dtype=weights.dtype) >= need
        return jnp.where(enough, higher, found)

    return lax.fori_loop(0, 32, turn, jnp.zeros(keys.shape[:1], jnp.uint32))
