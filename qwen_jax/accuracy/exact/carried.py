"""The whole forward pass in float64, with how far a right engine may be from it: each operation's
bound, carried on to what follows to first order."""

import numpy as np
from jaxtyping import Float, Int

from qwen_jax.accuracy.exact.bounds import Arithmetic, bounded
from qwen_jax.accuracy.exact.operations import (
    PARAMETRIC,
    Calls,
    Context,
    full_name,
    input_names,
    schedule,
)
from qwen_jax.accuracy.exact.parameters import Source, Weights

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
        params = weights[name] if name in PARAMETRIC else ()
        held[full_name(name, layer)] = bounded(name, ctx, arithmetic, inputs, params)
        for done in [n for n in held if last.get(n, at + 1) <= at]:
            del held[done]
    return held["logits"]


def log_softmax(x: Float[np.ndarray, "... V"], error: Float[np.ndarray, "... V"]) -> Bounded:
    """Log-probabilities of logits that may be off by so much.

    The normaliser is off by the mean of the logits' errors under the probabilities; an engine takes
    exponentials and their sum in float32.
    """
    with np.errstate(all="ignore"):
        top = x.max(axis=-1, keepdims=True)
        total = np.exp(x - top).sum(axis=-1, keepdims=True)
        out = x - top - np.log(total)
        shared = (np.exp(out) * error).sum(axis=-1, keepdims=True)
    return out, error + shared + 2.0**-24 * (np.abs(out) + np.abs(x) + 8)
