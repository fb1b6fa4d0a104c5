"""The KL divergence of float32 logits on the device, exact to float32 however small it is."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALL, LARGE = 0.1, 20.0


def kl_divergence(
    candidate: Float[Array, "*T V"], base: Float[Array, "*T V"]
) -> Float[Array, "*T"]:
    """KL(base || candidate) in nats of each position.

    The difference of two float32 log-probabilities is off by some 1e-7, and so would be their mean,
    as much as all of a Q8_0 tensor costs. With p of the base, d = candidate - base and
    d' = d - E_p[d], KL is ln E_p[exp(d')] = ln(1 + E_p[exp(d') - 1 - d']): a sum of what is not
    negative, so that nothing cancels.
    """
    logp = jax.nn.log_softmax(base, axis=-1)
    p = jnp.exp(logp)
    d = candidate - base
    d -= (p * d).sum(-1, keepdims=True)
    # p exp(d'), where exp(d') alone could overflow.
    large = jnp.exp(logp + d) - p * (1 + d)
    found = jnp.log1p(jnp.where(d < LARGE, p * _beyond_linear(d), large).sum(-1))
    # What overflows even so is a divergence so large that the plain formula is exact enough.
    plain = jax.nn.logsumexp(candidate, axis=-1) - jax.nn.logsumexp(base, axis=-1)
    plain -= (p * (candidate - base)).sum(-1)
    return jnp.where(found < LARGE, found, plain)


def _beyond_linear(x: Float[Array, "*T V"]) -> Float[Array, "*T V"]:
    """exp(x) - 1 - x; by its series where the difference would cancel.

    Below 0.1 the terms left out are x^6 / 20160 of the first, less than 1e-10.
    """
    series = 0.5 * x * x * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    return jnp.where(jnp.abs(x) < SMALL, series, jnp.expm1(jnp.minimum(x, LARGE)) - x)
