"""The forward pass of a text in NumPy float64: the truth."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from qwen_jax.accuracy.exact.operations import (
    Calls,
    Context,
    Knobs,
    full_name,
    input_names,
    schedule,
)
from qwen_jax.accuracy.exact.parameters import Source, Weights
from qwen_jax.accuracy.exact.pieces import evaluate


def forward(
    source: Source,
    tokens: Sequence[int],
    chunks: Sequence[int] | None = None,
    knobs: Mapping[str, Knobs] | None = None,
) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """Every tensor of a text in float64, one after another, a layer's parameters at a time.

    Args:
        chunks: lengths of the calls; they matter only to faults.
        knobs: by operation, where they are not as they should be.
    """
    config = source.config
    calls = Calls.of(chunks or [len(tokens)])
    ids = np.asarray(tokens)
    held: dict[str, np.ndarray] = {}
    weights = Weights(source, None)
    for layer, name in schedule(config):
        if weights.layer != layer:
            weights = Weights(source, layer)
        ctx = Context(config, calls, ids, (knobs or {}).get(name, Knobs()))
        inputs = [held[n] for n in input_names(name, layer, config)]
        value = evaluate(name, ctx, inputs, weights.held(name))
        if name in ("ffn_residual", "embed"):  # all that the next layer reads
            held.clear()
        held[full_name(name, layer)] = value
        yield full_name(name, layer), value
