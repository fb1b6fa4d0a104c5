"""The definition of correct for `rope`, in plain jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    inv_freq: Float[Array, "R2"],
    attention_factor: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
    # float32 holds every position to 131,071 exactly; bfloat16 rounds 257 to 256.
    angles = positions.astype(jnp.float32)[:, :, None, None] * inv_freq.astype(jnp.float32)
    cos, sin = jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T 1 R2"], sin: Float[Array, "B T 1 R2"]
) -> Float[Array, "B T heads H"]:
    half = cos.shape[-1]
    first, second = x[..., :half].astype(cos.dtype), x[..., half : 2 * half].astype(cos.dtype)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([r.astype(x.dtype) for r in rotated] + [x[..., 2 * half :]], axis=-1)
