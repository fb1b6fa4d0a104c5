"""The float64 forward pass over entries of a cache, each seeing what the simulation says it sees.

There is no cache here: keys and values of all entries lie side by side, and who sees whom is a
matrix. Operations and their bounds are those of the rest of the laboratory; the bound of each
operation is carried on to what follows, to first order.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from qwen_jax.accuracy.cache.slots import Entries
from qwen_jax.accuracy.exact.bounds import Arithmetic, Error, bound
from qwen_jax.accuracy.exact.carried import log_softmax
from qwen_jax.accuracy.exact.operations import INNER, OPERATIONS, PARAMETRIC, Calls, Context
from qwen_jax.accuracy.exact.parameters import Source, Weights

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
    entries: Entries,
    arithmetic: Arithmetic,
    used: Int[np.ndarray, "V"],
    every: int,
) -> Iterator[Expected]:
    """What the slots of the text hold, layer by layer, then the log-probabilities after it.

    Args:
        used: tokens in use; log-probabilities are over these,
        every: and after positions that are a multiple of this.
    """
    config = source.config
    plain = Context(config, Calls.of([len(entries.tokens)]), entries.tokens)
    seen = entries.sees > 0
    with np.errstate(divide="ignore"):
        several = np.log(entries.sees)[:, None]
    contexts = {
        "q_rope": plain.turned(position=lambda _: entries.query),
        "k_rope": plain.turned(position=lambda _: entries.key),
        "attn_scores": plain.turned(visible=lambda _, slot: seen),
    }
    outer = Weights(source, None)

    def run(
        name: str, inputs: list[Array], errors: list[Error], weights: Weights
    ) -> tuple[Array, Array]:
        ctx = contexts.get(name, plain)
        params = weights[name] if name in PARAMETRIC else ()
        value = OPERATIONS[name](ctx, inputs, params)
        return value, bound(name, ctx, arithmetic, value, inputs, errors, params)

    stream = run("embed", [], [], outer)
    for layer in range(config.num_layers):
        weights = Weights(source, layer)
        held: dict[str, tuple[Array, Array]] = {"stream": stream}
        for name in INNER:
            pairs = [held[n] for n in OPERATIONS[name].inputs]
            inputs: list[Array] = [p[0] for p in pairs]
            errors: list[Error] = [p[1] for p in pairs]
            if entries.poisoned and name in ("attn_scores", "attn_out"):
                lost = np.isnan(held["k_rope"][0]).any(axis=(1, 2))
                inputs, errors = [np.nan_to_num(x) for x in inputs], [_finite(e) for e in errors]
            value, error = run(name, inputs, errors, weights)
            if name in ("k_rope", "v_proj"):
                value[-1], error[-1] = 0.0, 0.0  # what an unwritten slot holds
            elif name == "attn_scores":
                # An entry in several slots counts as often.
                value = np.where(seen[:, None], value + several, value)
            elif name == "attn_out" and entries.poisoned:
                # NaN times a probability of 0 would be NaN here, and must not be in an engine.
                lost[-1] = True
                value[lost | seen[:, lost].any(axis=1)] = np.nan
            held[name] = value, error
            if name == "k_rope":  # the values are there too
                for what, source_name in (("keys", "k_rope"), ("values", "v_proj")):
                    value, error = (x[entries.slots] for x in held[source_name])
                    stored = error + arithmetic.cache * np.abs(value)
                    yield Expected(f"{what} of layer {layer}", layer, value, stored)
        stream = held["ffn_residual"]
    output = entries.output[::every]
    known = output >= 0
    rows = output[known]
    last = run("final_norm", [stream[0][rows]], [stream[1][rows]], outer)
    value, error = run("logits", [last[0]], [last[1]], outer)
    value, error = log_softmax(value[:, used], error[:, used])
    shape = (len(known), value.shape[1])
    out, limit = np.full(shape, np.nan), np.full(shape, np.inf)
    out[known], limit[known] = value, error
    yield Expected("logits", None, out, limit)


def _finite(error: Error) -> Error:
    return np.nan_to_num(error, posinf=0.0) if isinstance(error, np.ndarray) else error
