"""The definition of correct for `decode_step`, in plain jnp over the same packed weights.

It rounds every product's input as the storage of its weights says. In float16 the kernels take
larger ones, and that of few rows keeps more of them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step.packed.packing import Packed
from pallas_kernels.decode_step.packed.plan import DOWN, GATE_UP, HEAD, O_PROJ, QKV, StepPlan
from pallas_kernels.gqa_decode_attention.reference import reference as attention
from pallas_kernels.rope.reference import reference as rope


def reference(
    packed: Packed,
    plan: StepPlan,
    hidden: Float[Array, "B D"],
    pages: Float[Array, "2L P K C H"],
    tables: Int[Array, "B n"],
    position: Int[Array, "B"],
    inv_freq: Float[Array, "R2"],
    attention_factor: float,
    preceding: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B V"], Float[Array, "2L B K H"]]:
    shape, cache = plan.shape, pages.dtype
    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
    rows = jnp.arange(hidden.shape[0])

    def product(x: Float[Array, "B in"], phase: int, layer: int = 0) -> Float[Array, "B out"]:
        weights, inputs = packed.matrix(plan, phase, layer), plan.phases[phase].storages[0].inputs
        f32 = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        return jnp.einsum("oi,bi->bo", weights, x.astype(inputs), **f32)

    def norm(x: Float[Array, "B D"], index: int) -> Float[Array, "B D"]:
        mean = jnp.mean(x * x, axis=1, keepdims=True)
        return x * lax.rsqrt(mean + shape.eps) * packed.norms[index]

    def cached(i: int) -> Float[Array, "B K S H"]:
        """A layer's keys, or values, in every row's order."""
        # An entry that names no page stands for slots that are not attended to.
        own = pages[i].at[tables].get(mode="clip").swapaxes(1, 2)  # [B, K, n, C, H]
        return own.reshape(len(rows), kv_heads, -1, dim)

    def with_new(held: Float[Array, "B K S H"], new: Float[Array, "B K H"]) -> jax.Array:
        """With each row's own, and those of the rows before it that are of its text."""
        if preceding is None:
            return held.at[rows, :, position].set(new)
        back = jnp.arange(len(rows))
        place = jnp.where(back <= preceding[:, None], position[:, None] - back, held.shape[2])
        return held.at[rows[:, None], :, place].set(new[rows[:, None] - back], mode="drop")

    x = hidden.astype(jnp.float32)
    keys, values = [], []
    for i in range(shape.layers):
        qkv = product(norm(x, 2 * i), QKV, i) + packed.bias[i]
        qkv = qkv.reshape(len(rows), 1, -1, dim)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        q, k = rope(q, k, position[:, None], inv_freq, attention_factor)
        q, k, v = (y[:, 0].astype(cache) for y in (q, k, v))
        k_all, v_all = (with_new(cached(n), y) for n, y in ((i, k), (shape.layers + i, v)))
        # Each row's keys in order are a page of its own now, and so are its values.
        both, own = jnp.concatenate([k_all, v_all]), rows[:, None]
        attended = attention(q, both, own, own + len(rows), position + 1)
        x = x + product(attended.reshape(len(rows), -1), O_PROJ, i)
        gate, up = jnp.split(product(norm(x, 2 * i + 1), GATE_UP, i), 2, axis=1)
        x = x + product(jax.nn.silu(gate) * up, DOWN, i)
        keys.append(k)
        values.append(v)
    return product(norm(x, 2 * shape.layers), HEAD), jnp.stack(keys + values)
