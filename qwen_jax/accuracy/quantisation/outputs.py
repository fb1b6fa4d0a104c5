"""The error that a quantised matrix makes in its own product, on the base's own activations.

Biases are left out: they are not quantised, and Qwen's are so large that they would hide the error.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.quantisation import programs
from qwen_jax.accuracy.quantisation.pairs import Pair
from qwen_jax.accuracy.quantisation.sweep import Sweep
from qwen_jax.accuracy.quantisation.weights import BASE, Weights


def output_errors(sweep: Sweep, progress: Progress | None = None) -> dict[str, float]:
    """Of every matrix, by name: RMS of its product's error over that of the product.

    Of an embedding that is not the head too it is the error of the rows looked up.
    """
    found: dict[str, float] = {}
    layers = sweep.config.num_layers
    outside = sweep.weights(None)
    state = sweep.embedded(outside, BASE)[None]
    for layer in range(layers):
        weights = sweep.weights(layer)
        state, seen = programs.watched_layer(sweep.spec, weights.layer(BASE), state)
        for pair in weights.pairs.values():
            if len(pair.shape) > 1:
                inputs = seen[pair.parameter.split(".", 2)[2]][0]
                found[pair.name] = _of_product(sweep, weights, pair, inputs)
        if progress:
            progress(layer + 1, layers + 1)
    hidden = programs.normed(sweep.spec, outside.parameter(BASE, "final_norm"), state[0])
    for pair in outside.pairs.values():
        if pair.parameter == "embed" and not sweep.config.tied:
            have, right = (outside.values(pair, base=b)[sweep.tokens] for b in (False, True))
            found[pair.name] = float(programs.relative_rms(have, right))
        elif len(pair.shape) > 1:
            found[pair.name] = _of_product(sweep, outside, pair, hidden)
    if progress:
        progress(layers + 1, layers + 1)
    return found


def _of_product(sweep: Sweep, weights: Weights, pair: Pair, inputs: Float[Array, "T in"]) -> float:
    have, right = (
        programs.product(sweep.spec, inputs, jnp.asarray(weights.values(pair, base=base)))
        for base in (False, True)
    )
    return float(programs.relative_rms(have, right))
