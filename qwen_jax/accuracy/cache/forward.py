"""The float64 forward pass over entries of a cache, each seeing what the simulation says it sees.

There is no cache here: keys and values of a text's entries lie side by side, and who sees whom is
a matrix. Operations and their bounds are those of the rest of the laboratory; the bound of each
operation is carried on to what follows, to first order.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from qwen_jax.accuracy import spread
from qwen_jax.accuracy.cache.slots import Entries
from qwen_jax.accuracy.exact.bounds import Arithmetic, bounded
from qwen_jax.accuracy.exact.carried import Bounded, log_softmax
from qwen_jax.accuracy.exact.operations import INNER, OPERATIONS, Calls, Context
from qwen_jax.accuracy.exact.parameters import Source, Weights
from qwen_jax.config import ModelConfig

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Expected:
    """Something the engine shows, and how far a right engine may be from it.

    Attributes:
        name: "keys of layer 3", "values of layer 3" or "logits".
        value: [T, K, H], slot by slot, or [P, V], after every so many positions; rows that nothing
            is known of are NaN.
    """

    name: str
    layer: int | None
    value: Float[Array, "T ..."]
    bound: Float[Array, "T ..."]


def forward(
    source: Source,
    texts: Sequence[Entries],
    arithmetic: Arithmetic,
    used: Int[np.ndarray, "V"],
    every: int,
) -> Iterator[tuple[int, Expected]]:
    """What the slots of some texts hold, layer by layer, then the log-probabilities after them,
    each with its text's number.

    Texts lie side by side in every operation but attention: a weight is fetched once for all.

    Args:
        used: tokens in use; log-probabilities are over these,
        every: and after positions that are a multiple of this.
    """
    config = source.config
    tokens, query, key = (
        np.concatenate([getattr(text, field) for text in texts])
        for field in ("tokens", "query", "key")
    )
    ends = np.cumsum([len(text.tokens) for text in texts])
    rows = [slice(end - len(text.tokens), end) for end, text in zip(ends, texts, strict=True)]
    plain = Context(config, Calls.of([len(tokens)]), tokens)
    contexts = {
        name: dataclasses.replace(plain, calls=dataclasses.replace(plain.calls, position=position))
        for name, position in (("q_rope", query), ("k_rope", key))
    }
    outer = Weights(source, None)

    def run(name: str, inputs: list[Bounded], weights: Weights) -> Bounded:
        return bounded(name, contexts.get(name, plain), arithmetic, inputs, weights.held(name))

    stream = run("embed", [], outer)
    for layer in range(config.num_layers):
        weights = Weights(source, layer)
        held: dict[str, Bounded] = {"stream": stream}
        for name in INNER:
            if name in ("attn_scores", "attn_probs"):
                continue  # `_attention` does all three
            if name == "attn_out":
                of_each = [
                    _attention(
                        config,
                        text,
                        arithmetic,
                        *(_cut(held[n], some) for n in ("q_rope", "k_rope", "v_proj")),
                    )
                    for some, text in zip(rows, texts, strict=True)
                ]
                value, error = (np.concatenate(x) for x in zip(*of_each, strict=True))
            else:
                value, error = run(name, [held[n] for n in OPERATIONS[name].inputs], weights)
            if name in ("k_rope", "v_proj"):
                value[ends - 1], error[ends - 1] = 0.0, 0.0  # what an unwritten slot holds
            held[name] = value, error
            if name == "k_rope":  # the values are there too
                for number, (some, text) in enumerate(zip(rows, texts, strict=True)):
                    for what, source_name in (("keys", "k_rope"), ("values", "v_proj")):
                        value, error = (x[some][text.slots] for x in held[source_name])
                        stored = error + arithmetic.cache * np.abs(value)
                        yield number, Expected(f"{what} of layer {layer}", layer, value, stored)
        stream = held["ffn_residual"]
    # One text after another: log-probabilities of all positions at once would take gigabytes.
    for number, (some, text) in enumerate(zip(rows, texts, strict=True)):
        output = text.output[::every]
        known = np.flatnonzero(output >= 0)
        last = run("final_norm", [_cut(stream, some.start + output[known])], outer)
        found = _log_probabilities(run("logits", [last], outer), used)
        shape = len(output), len(used)
        value, error = np.full(shape, np.nan), np.full(shape, np.inf)
        value[known], error[known] = found
        yield number, Expected("logits", None, value, error)


def _log_probabilities(logits: Bounded, used: Int[np.ndarray, "V"]) -> Bounded:
    """Of the tokens in use."""

    def some(rows: slice) -> Bounded:
        value, error = _cut(logits, rows)
        return log_softmax(value[:, used], error[:, used])

    parts = spread.parts(len(logits[0]), len(used))
    value, error = spread.gathered(some, parts, parts)
    return value, error


def _attention(
    config: ModelConfig,
    text: Entries,
    arithmetic: Arithmetic,
    queries: Bounded,
    keys: Bounded,
    values: Bounded,
) -> Bounded:
    """Attention's result of one text, in whose slots nothing of another one is."""
    seen = text.sees > 0
    plain = Context(config, Calls.of([len(text.tokens)]), text.tokens)
    lost = np.asarray(np.isnan(keys[0]).any(axis=(1, 2)))
    if text.poisoned:
        queries, keys, values = (_finite(pair) for pair in (queries, keys, values))
    ctx = plain.turned(visible=lambda calls, _: seen[calls.position])
    value, error = bounded("attn_scores", ctx, arithmetic, [queries, keys], ())
    with np.errstate(divide="ignore"):  # an entry in several slots counts as often
        value = np.where(seen[:, None], value + np.log(text.sees)[:, None], value)
    probs = bounded("attn_probs", plain, arithmetic, [(value, error)], ())
    if text.poisoned:
        probs = _finite(probs)
    value, error = bounded("attn_out", plain, arithmetic, [probs, values], ())
    if text.poisoned:
        # NaN times a probability of 0 would be NaN here, and must not be in an engine.
        lost[-1] = True
        value[lost | seen[:, lost].any(axis=1)] = np.nan
    return value, error


def _cut(pair: Bounded, rows: slice | Int[np.ndarray, "R"]) -> Bounded:
    return pair[0][rows], pair[1][rows]


def _finite(pair: Bounded) -> Bounded:
    return np.nan_to_num(pair[0]), np.nan_to_num(pair[1], posinf=0.0)
