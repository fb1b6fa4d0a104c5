"""The definition of correct for `decode_step`, in plain jnp over the same packed weights."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step.packing import HEAD, Packed
from pallas_kernels.decode_step.plan import Plan
from pallas_kernels.gqa_decode_attention.reference import reference as attention
from pallas_kernels.rope.reference import reference as rope


def reference(
    packed: Packed,
    plan: Plan,
    hidden: Float[Array, "D"],
    cache: Float[Array, "2L K S H"],
    position: Int[Array, ""],
    inv_freq: Float[Array, "H2"],
    attention_factor: float,
) -> tuple[Float[Array, "V"], Float[Array, "2L K H"]]:
    shape, dtype = plan.shape, cache.dtype
    k_cache, v_cache = cache[: shape.layers], cache[shape.layers :]
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim

    def product(x: Float[Array, "columns"], phase: int, layer: int = 0) -> Float[Array, "rows"]:
        weights = packed.matrix(plan, phase, layer)
        f32 = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        return jnp.einsum("oi,i->o", weights, x.astype(dtype), **f32)

    def norm(x: Float[Array, "D"], index: int) -> Float[Array, "D"]:
        return x * lax.rsqrt(jnp.mean(x * x) + shape.eps) * packed.norms[index]

    x = hidden.astype(jnp.float32)
    keys, values = [], []
    for i in range(shape.layers):
        qkv = (product(norm(x, 2 * i), 0, i) + packed.bias[i]).reshape(1, 1, -1, dim)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        q, k = rope(q, k, position[None, None], inv_freq, attention_factor)
        q, k, v = (y[0, 0].astype(dtype) for y in (q, k, v))
        at = (0, position, 0)
        k_all = lax.dynamic_update_slice(k_cache[i], k[:, None], at)
        v_all = lax.dynamic_update_slice(v_cache[i], v[:, None], at)
        attended = attention(q[None], k_all[None], v_all[None], position[None] + 1)
        x = x + product(attended.reshape(-1), 1, i)
        gate, up = jnp.split(product(norm(x, 2 * i + 1), 2, i), 2)
        x = x + product(jax.nn.silu(gate) * up, 3, i)
        keys.append(k)
        values.append(v)
    logits = product(norm(x, 2 * shape.layers), HEAD)
    return logits, jnp.stack(keys + values)
