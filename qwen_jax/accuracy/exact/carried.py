"""The whole forward pass in float64, with how far a right engine may be from it: each operation's
bound, carried on to what follows to first order."""

import numpy as np
from jaxtyping import Float, Int

from qwen_jax.accuracy.exact.bounds import Arithmetic, bounded, reduction
from qwen_jax.accuracy.exact.operations import (
    Calls,
    Context,
    full_name,
    input_names,
    schedule,
)
from qwen_jax.accuracy.exact.parameters import Source, Weights
from qwen_jax.accuracy.exact.rounding import UNIT

Bounded = tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]
"""A value, and how far it may be off."""


def logits(source: Source, tokens: Int[np.ndarray, "T"], arithmetic: Arithmetic) -> Bounded:
    """Logits after every token of a text, `[T, V]`, and their bounds."""
    config = source.config
    held: dict[str, Bounded] = {}
    ctx = Context(config, Calls.of([len(tokens)]), np.asarray(tokens))
    plan, weights = schedule(config), Weights(source, None)
    last = {n: at for at, (i, op) in enumerate(plan) for n in input_names(op, i, config)}
    for at, (layer, name) in enumerate(plan):
        if weights.layer != layer:
            weights = Weights(source, layer)
        inputs = [held[n] for n in input_names(name, layer, config)]
        held[full_name(name, layer)] = bounded(name, ctx, arithmetic, inputs, weights.held(name))
        for done in [n for n in held if last.get(n, at + 1) <= at]:
            del held[done]
    return held["logits"]


def log_softmax(
    x: Float[np.ndarray, "... V"], error: Float[np.ndarray, "... V"], unit: float = UNIT["float32"]
) -> Bounded:
    """Log-probabilities of logits that may be off by so much.

    Args:
        unit: roundoff of the arithmetic in which an engine takes exponentials, their sum and its
            logarithm.
    """
    with np.errstate(all="ignore"):
        top = x.max(axis=-1, keepdims=True)
        weights = np.exp(x - top)
        total = weights.sum(axis=-1, keepdims=True)
        out = x - top - np.log(total)
        grown = np.exp(out + error).sum(axis=-1, keepdims=True)
        own = unit * (np.abs(out) + np.abs(x) + 8) + of_sum(weights, total)
        return out, fall(out, error, grown) + own


def of_sum(
    weights: Float[np.ndarray, "... V"], total: Float[np.ndarray, "... 1"]
) -> Float[np.ndarray, "... 1"]:
    """By how much the logarithm of a float32 sum of exponentials may be off for its additions."""
    squares = np.einsum("...v,...v->...", weights, weights)[..., None]
    return reduction(total, squares, weights.shape[-1]) / total


def fall(
    logprobs: Float[np.ndarray, "..."],
    error: Float[np.ndarray, "..."],
    grown: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """By how much log-probabilities fall at most where every logit may be off by its error.

    It falls furthest where its own logit is too small and all others are too large. -ln p is convex
    in the logits, so that it rises by no more than that.

    Args:
        logprobs, error: of some tokens.
        grown: the sum of all probabilities times exp(their errors).
    """
    with np.errstate(all="ignore"):
        others = np.maximum(grown - np.exp(logprobs + error), 0)
        found = np.logaddexp(0, np.log(others) + error - logprobs) + logprobs
    return np.where(np.isnan(found), np.inf, np.maximum(found, 0))
