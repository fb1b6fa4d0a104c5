"""The compiled programs: a layer, what its matrices are multiplied with, logits, and distances.

Weights are data, and every layer is called `layers.0`: one program of a shape serves all of them.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from qwen_jax.accuracy.quantisation.divergence import kl_divergence
from qwen_jax.config import ModelConfig
from qwen_jax.engine.spec import Spec
from qwen_jax.model.cache import Cache
from qwen_jax.model.decoder import DecoderLayer, Parameters, RMSNorm, parameter
from qwen_jax.model.products import matmul
from qwen_jax.model.rotary import inverse_frequencies
from qwen_jax.model.split import WHOLE
from qwen_jax.model.tap import recording

PREFIX = "layers.0."

INPUTS = {
    "qkv_proj.weight": "attn_norm",
    "o_proj.weight": "attn_out",
    "gate_up_proj.weight": "ffn_norm",
    "down_proj.weight": "ffn_act",
}
"""What each of a layer's matrices is multiplied with."""


def spec_for(config: ModelConfig, implementation: str) -> Spec:
    """In float32 throughout, so that what is measured is the file's rounding alone."""
    float32 = jnp.dtype(jnp.float32)
    return Spec(
        dataclasses.replace(config, num_layers=1),
        float32,
        float32,
        lax.Precision.HIGHEST,
        implementation,
    )


def _layer(spec: Spec, parameters: Parameters, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    config = spec.config
    rows, steps, _ = x.shape
    how = (spec.precision, spec.implementation, WHOLE)
    layer = DecoderLayer(config, parameters, PREFIX, *how)
    positions = jnp.broadcast_to(jnp.arange(steps), (rows, steps))
    lengths = jnp.full(rows, steps)
    cache = Cache.create(config, rows, steps, spec.cache)
    inv_freq = jnp.asarray(inverse_frequencies(config))
    return layer(x, cache, 0, positions, lengths, inv_freq)[0]


layer = functools.partial(jax.jit, static_argnums=0)(_layer)
"""Hidden states of B texts of T tokens after a layer."""


@functools.partial(jax.jit, static_argnums=0)
def watched_layer(
    spec: Spec, parameters: Parameters, x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], Mapping[str, Float[Array, "B T in"]]]:
    """The same, and what each matrix was multiplied with."""
    with recording() as seen:
        out = _layer(spec, parameters, x)
    return out, {name: seen[PREFIX + source] for name, source in INPUTS.items()}


@functools.partial(jax.jit, static_argnums=0)
def normed(spec: Spec, norm: Float[Array, " D"], x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """Behind the final norm."""
    made = parameter({"final_norm": norm}, "", "final_norm")
    return RMSNorm(made, spec.config.rms_eps)(x[None])[0]


@functools.partial(jax.jit, static_argnums=0)
def product(
    spec: Spec, x: Float[Array, "T in"], weight: Float[Array, "out in"]
) -> Float[Array, "T out"]:
    """x @ weight.T, as the model multiplies."""
    return matmul(x, weight, spec.precision)


@jax.jit
def compared(
    candidate: Float[Array, "T V"], base: Float[Array, "T V"]
) -> tuple[Float[Array, "T"], Bool[Array, "T"]]:
    """KL(base || candidate) and whether the likeliest token is the same."""
    return kl_divergence(candidate, base), candidate.argmax(-1) == base.argmax(-1)


@jax.jit
def relative_rms(have: Float[Array, "*shape"], right: Float[Array, "*shape"]) -> jax.Array:
    """RMS of the difference over that of what is right."""
    error = have - right
    return jnp.sqrt((error * error).sum() / (right * right).sum())
