"""The Qwen2.5 decoder in Flax NNX, top to bottom.

Shape letters: B rows, T positions, S cache capacity, N query heads, K key/value heads,
H head dimension, R2 rotated pairs of it, D hidden size, F feed-forward size, V vocabulary.
A linear weight is `[out, in]`, as checkpoints store it. Named scopes say in a profile to which
operation XLA's belong.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax, named_scope
from jaxtyping import Array, Float, Int

import pallas_kernels
from qwen_jax.config import ModelConfig
from qwen_jax.model.cache import HEADS, Cache
from qwen_jax.model.products import FeedForward, activation_dtype, matmul, summed_matmul
from qwen_jax.model.rotary import inverse_frequencies
from qwen_jax.model.split import WHOLE, Whole
from qwen_jax.model.tap import tap, watched

Parameters = Mapping[str, jax.Array]
"""Canonical parameter name to array, as `qwen_jax.weights.loader` makes it."""

AXES: dict[str, tuple[str | None, ...]] = {
    "embed": ("vocab", None),
    "attn_norm": (None,),
    "qkv_proj.weight": ("heads", None),
    "qkv_proj.bias": ("heads",),
    "o_proj.weight": (None, "heads"),
    "ffn_norm": (None,),
    "gate_up_proj.weight": ("ffn", None),
    "down_proj.weight": (None, "ffn"),
    "final_norm": (None,),
    "lm_head": ("vocab", None),
}
"""Logical axis names of each parameter. One that has a name is dealt out on a mesh: a device's
rows of `qkv_proj` are its heads' of q, then of k, then of v, and of `gate_up_proj` gate's, then
up's."""


def dealt_axis(name: str) -> int | None:
    """The axis along which a mesh deals a parameter out, if it does."""
    layer, _, rest = name.partition(".")
    axes = AXES[rest.partition(".")[2] if layer == "layers" else name]
    return next((i for i, axis in enumerate(axes) if axis is not None), None)


def parameter(params: Parameters, prefix: str, name: str) -> nnx.Param:
    return nnx.Param(params[prefix + name], axes=AXES[name])


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, weight: nnx.Param, eps: float):
        self.weight, self.eps = weight, eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x32 = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale * self.weight[...]).astype(x.dtype)


def attention_scores(
    q: Float[Array, "B T N H"],
    k_cache: Float[Array, "B K S H"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B T N S"]:
    """q k^T / sqrt(H), float32, and -inf where a query doesn't see a slot."""
    batch, steps, heads, dim = q.shape
    kv_heads, capacity = k_cache.shape[1:3]
    grouped = q.reshape(batch, steps, kv_heads, heads // kv_heads, dim)
    f32 = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    scores = jnp.einsum("btkgh,bksh->btkgs", grouped, k_cache, **f32) * dim**-0.5
    scores = scores.reshape(batch, steps, heads, capacity)
    slots = jnp.arange(capacity)
    seen = (slots <= positions[:, :, None]) & (slots < lengths[:, None, None])
    return jnp.where(seen[:, :, None], scores, -jnp.inf)


CACHE: Any = Cache(HEADS, None)  # type: ignore[arg-type]
"""Of a cache's arrays, the axis that is dealt out: key/value heads."""


class Attention(nnx.Module):
    """Grouped-query attention with biased q, k, v projections and rotary embedding."""

    def __init__(
        self,
        config: ModelConfig,
        params: Parameters,
        prefix: str,
        precision: lax.Precision,
        implementation: str,
        split: Whole,
    ):
        self.prefix, self.precision, self.implementation = prefix, precision, implementation
        part = split.part(config)
        self.split, self.heads, self.kv_heads = split, part.num_heads, part.num_kv_heads
        self.copies = split.cached(config).num_kv_heads // config.num_kv_heads
        self.head_dim = config.head_dim
        self.attention_factor = config.attention_factor
        self.weight = parameter(params, prefix, "qkv_proj.weight")
        self.bias = parameter(params, prefix, "qkv_proj.bias")
        self.out = parameter(params, prefix, "o_proj.weight")

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        layer: int,
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B"],
        inv_freq: Float[Array, "R2"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        steps, over = x.shape[1], self.split.over
        dealt = over(self._projected, (None, 0, 0), (2, 2, 2))
        with named_scope("qkv_proj"):
            q, k, v = dealt(x, self.weight[...], self.bias[...])
        q = tap(f"{self.prefix}q_proj", q)
        k, v = self._tapped("k_proj", k, 2), self._tapped("v_proj", v, 2)
        rope = functools.partial(
            pallas_kernels.rope,
            attention_factor=self.attention_factor,
            implementation=self.implementation,
        )
        q, k = over(rope, (2, 2, None, None), (2, 2))(q, k, positions, inv_freq)
        q, k = tap(f"{self.prefix}q_rope", q), self._tapped("k_rope", k, 2)
        start = tap(f"{self.prefix}cache_slots", positions[:, 0])

        def write(cache: Cache, *new: jax.Array) -> Cache:
            return cache.write(layer, *new)

        put = over(write, (CACHE, 2, 2, None, None), CACHE)
        with named_scope("cache_write"):
            cache = put(cache, k, v, start, lengths + (start - positions[:, 0]))
        # As the keys it meets: float32 beside a float16 cache is served by no kernel.
        q = q.astype(cache.pages.dtype)
        if watched():  # the operations below hold none of what is to be looked at
            cache = self._shown(q, cache, layer, positions, lengths)
        if steps == 1:

            def attend(q: jax.Array, cache: Cache, lengths: jax.Array) -> jax.Array:
                tables = cache.layer_tables(layer)
                return pallas_kernels.gqa_decode_attention(
                    q, cache.flat, *tables, lengths, implementation=self.implementation
                )

            attended = over(attend, (1, CACHE, None), 1)(q[:, 0], cache, lengths)
        else:

            def attend_all(q: jax.Array, cache: Cache, *places: jax.Array) -> jax.Array:
                tables = cache.layer_tables(layer)
                return pallas_kernels.gqa_prefill_attention(
                    q, cache.flat, *tables, *places, implementation=self.implementation
                )

            attended = over(attend_all, (2, CACHE, None, None), 2)(
                q, cache, positions[:, 0], lengths
            )
        attended = attended.reshape(*x.shape[:2], -1).astype(x.dtype)
        attended = tap(f"{self.prefix}attn_out", attended)
        with named_scope("o_proj"):
            out = summed_matmul(attended, self.out[...], self.precision, self.split)
        return tap(f"{self.prefix}o_proj", out), cache

    def _projected(
        self, x: Float[Array, "B T D"], weight: Float[Array, "out in"], bias: Float[Array, " out"]
    ) -> tuple[Float[Array, "B T n H"], ...]:
        """Queries, keys and values, of a device's heads on a mesh."""
        qkv = matmul(x, weight, self.precision) + bias.astype(x.dtype)
        heads = qkv.reshape(*x.shape[:2], -1, self.head_dim)
        return tuple(jnp.split(heads, [self.heads, self.heads + self.kv_heads], axis=2))

    def _tapped(self, name: str, x: Float[Array, "B ..."], axis: int) -> Float[Array, "B ..."]:
        """`tap` of what has key/value heads along an axis, each of them once."""
        name = f"{self.prefix}{name}"
        if self.copies == 1 or not watched():
            return tap(name, x)
        once = jnp.take(x, jnp.arange(0, x.shape[axis], self.copies), axis)
        return jnp.repeat(tap(name, once), self.copies, axis)

    def _shown(
        self,
        q: Float[Array, "B T N H"],
        cache: Cache,
        layer: int,
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B"],
    ) -> Cache:
        """Taps what the layer sees, position after position; the cache is another one where an
        intervention changed it."""
        keys, values = cache.layer(layer)
        k_cache, v_cache = self._tapped("k_cache", keys, 1), self._tapped("v_cache", values, 1)
        if k_cache is not keys or v_cache is not values:
            cache = cache.with_layer(layer, k_cache, v_cache)
        scores = attention_scores(q, k_cache, positions, lengths)
        scores = tap(f"{self.prefix}attn_scores", scores)
        tap(f"{self.prefix}attn_probs", jax.nn.softmax(scores, axis=-1))
        return cache


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020), gate and up in one matrix."""

    def __init__(self, params: Parameters, prefix: str, precision: lax.Precision, split: Whole):
        self.prefix, self.precision, self.split = prefix, precision, split
        self.gate_up = parameter(params, prefix, "gate_up_proj.weight")
        self.down = parameter(params, prefix, "down_proj.weight")

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        def projected(
            x: Float[Array, "B T D"], weight: Float[Array, "out in"]
        ) -> tuple[jax.Array, ...]:
            return tuple(jnp.split(matmul(x, weight, self.precision), 2, axis=-1))

        weight = self.gate_up[...]
        if isinstance(weight, FeedForward) and not watched():
            with named_scope("feed_forward"):
                return weight.feed_forward(x, self.precision)
        with named_scope("gate_up_proj"):
            gate, up = self.split.over(projected, (None, 0), (2, 2))(x, weight)
        gate, up = tap(f"{self.prefix}gate_proj", gate), tap(f"{self.prefix}up_proj", up)
        with named_scope("ffn_act"):
            hidden = tap(f"{self.prefix}ffn_act", jax.nn.silu(gate) * up)
        with named_scope("down_proj"):
            out = summed_matmul(hidden, self.down[...], self.precision, self.split)
        return tap(f"{self.prefix}down_proj", out)


class DecoderLayer(nnx.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        params: Parameters,
        prefix: str,
        precision: lax.Precision,
        implementation: str,
        split: Whole,
    ):
        self.prefix = prefix
        self.attn_norm = RMSNorm(parameter(params, prefix, "attn_norm"), config.rms_eps)
        self.attention = Attention(config, params, prefix, precision, implementation, split)
        self.ffn_norm = RMSNorm(parameter(params, prefix, "ffn_norm"), config.rms_eps)
        self.mlp = MLP(params, prefix, precision, split)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        layer: int,
        positions: Int[Array, "B T"],
        lengths: Int[Array, "B"],
        inv_freq: Float[Array, "R2"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        with named_scope("attn_norm"):
            normed = tap(f"{self.prefix}attn_norm", self.attn_norm(x))
        attended, cache = self.attention(normed, cache, layer, positions, lengths, inv_freq)
        x = tap(f"{self.prefix}attn_residual", x + attended)
        with named_scope("ffn_norm"):
            normed = tap(f"{self.prefix}ffn_norm", self.ffn_norm(x))
        x = tap(f"{self.prefix}ffn_residual", x + self.mlp(normed))
        return x, cache


class Qwen2(nnx.Module):
    """The decoder: token ids and a cache in, hidden states and the grown cache out.

    Args:
        config: sizes and constants.
        params: every parameter by its canonical name.
        precision: of float32 matrix products; HIGHEST never uses TF32.
        implementation: "auto", "mosaic_gpu" or "xla", for every operation.
        look_up: from token ids to rows of the embedding, where that is cheaper than to have all
            of it (`params` is then asked for it only by the head it is tied to).
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Parameters,
        *,
        precision: lax.Precision = lax.Precision.HIGHEST,
        implementation: str = "auto",
        look_up: Callable[[Int[Array, "B T"]], Float[Array, "B T D"]] | None = None,
        split: Whole = WHOLE,
    ):
        self.config, self.precision, self.look_up = config, precision, look_up
        self.split = split
        self.embed = parameter(params, "", "embed")
        self.layers = nnx.List(
            DecoderLayer(config, params, f"layers.{i}.", precision, implementation, split)
            for i in range(config.num_layers)
        )
        self.final_norm = RMSNorm(parameter(params, "", "final_norm"), config.rms_eps)
        self.lm_head = None if config.tied else parameter(params, "", "lm_head")

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        start: Int[Array, "B"],
        lengths: Int[Array, "B"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Runs tokens that stand at positions start[b] .. start[b] + T - 1 of each row.

        Args:
            lengths: tokens each row has once these are in, padding not counted. Positions
                past it hold padding: their output is finite and means nothing.

        Returns:
            The hidden states after the final norm, and the cache with T more slots filled.
        """
        tokens, lengths = tap("tokens", tokens), tap("lengths", lengths)
        positions = tap("positions", start[:, None] + jnp.arange(tokens.shape[1]))
        look_up = self.look_up or functools.partial(self.split.look_up, self.embed[...])
        with named_scope("embed"):
            embedded = look_up(tokens)
            x = tap("embed", embedded.astype(activation_dtype(embedded.dtype)))
        inv_freq = jnp.asarray(inverse_frequencies(self.config))
        for i, layer in enumerate(self.layers):
            x, cache = layer(x, cache, i, positions, lengths, inv_freq)
        with named_scope("final_norm"):
            return tap("final_norm", self.final_norm(x)), cache

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Unnormalised log-probabilities of the next token, float32."""
        head = self.embed if self.lm_head is None else self.lm_head

        def own(hidden: Float[Array, "B T D"], head: Float[Array, "V D"]) -> Float[Array, "B T V"]:
            found = matmul(hidden, head, self.precision, jnp.dtype(jnp.float32))
            return self.split.join(found)

        with named_scope("lm_head"):
            return tap("logits", self.split.over(own, (None, 0), None)(hidden, head[...]))
