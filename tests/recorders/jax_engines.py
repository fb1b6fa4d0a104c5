"""Qwen2 in JAX as others write it: modules of Flax NNX and of Linen, and a scan over layers.

Written for the tests; what is planted goes by the names of the laboratory's catalogue.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from qwen_jax.config import ModelConfig

Tap = Callable[..., Any]
Params = Mapping[str, np.ndarray]


def norm(x: Any, weight: Any, eps: float) -> Any:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight


def rope(x: Any, config: ModelConfig, fault: str) -> Any:
    """x [..., T, heads, H]."""
    half = config.head_dim // 2
    theta = 1e4 if fault == "rope_theta_1e4" else config.rope_theta
    angles = jnp.arange(x.shape[-3])[:, None, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    if fault == "rope_interleaved":
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack((a * cos - b * sin, b * cos + a * sin), -1).reshape(x.shape)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def attend(q: Any, k: Any, v: Any, config: ModelConfig, tap: Tap, **at: Any) -> Any:
    """q [T, N, H], k and v [T, K, H] to [T, N H]."""
    k, v = (jnp.repeat(x, config.group_size, 1) for x in (k, v))
    scores = jnp.einsum("tnh,snh->nts", q, k, preferred_element_type=jnp.float32)
    seen = jnp.tri(len(q), dtype=bool)
    scores = jnp.where(seen, scores * config.head_dim**-0.5, jnp.finfo(jnp.float32).min)
    scores = tap("attn_scores", scores, "N T S", **at)
    probs = tap("attn_probs", jax.nn.softmax(scores, -1).astype(v.dtype), "N T S", **at)
    return jnp.einsum("nts,snh->tnh", probs, v).reshape(len(q), -1)


class Norm(nnx.Module):
    def __init__(self, weight: Any, eps: float):
        self.scale, self.eps = nnx.Param(weight), eps

    def __call__(self, x: Any) -> Any:
        return norm(x, self.scale[...], self.eps)


class Dense(nnx.Module):
    """As Einsum modules of Google's engines: heads are an axis of the result."""

    def __init__(self, weight: Any, bias: Any = None, heads: int | None = None):
        self.kernel, self.heads = nnx.Param(weight.T), heads
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Any) -> Any:
        out = x @ self.kernel[...]
        out = out if self.bias is None else out + self.bias[...]
        return out.reshape(*out.shape[:-1], self.heads, -1) if self.heads else out


class Embed(nnx.Module):
    def __init__(self, table: Any):
        self.embedding = nnx.Param(table)

    def __call__(self, ids: Any) -> Any:
        return self.embedding[...][ids]


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, part: Params, tap: Tap, fault: str):
        heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        for name, count in heads.items():
            weight, bias = (part[f"self_attn.{name}_proj.{kind}"] for kind in ("weight", "bias"))
            bias = None if fault == "zero_qkv_bias" else bias
            setattr(self, f"{name}_proj", Dense(weight, bias, count))
        self.o_proj = Dense(part["self_attn.o_proj.weight"])
        self.config, self.tap, self.fault = config, tap, fault

    def __call__(self, x: Any) -> Any:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = self.tap("q_rope", rope(q, self.config, self.fault), "1 T N H")
        k = self.tap("k_rope", rope(k, self.config, self.fault), "1 T K H")
        return self.o_proj(attend(q[0], k[0], v[0], self.config, self.tap)[None])


class Mlp(nnx.Module):
    def __init__(self, part: Params):
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, Dense(part[f"mlp.{name}.weight"]))

    def __call__(self, x: Any) -> Any:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, part: Params, tap: Tap, fault: str):
        self.attn, self.mlp = Attention(config, part, tap, fault), Mlp(part)
        self.input_layernorm = Norm(part["input_layernorm.weight"], config.rms_eps)
        self.post_attention_layernorm = Norm(
            part["post_attention_layernorm.weight"], config.rms_eps
        )

    def __call__(self, x: Any) -> Any:
        x = x + self.attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nnx.Module):
    def __init__(
        self, config: ModelConfig, params: Params, tap: Tap, *, fault: str = "", dtype: str
    ):
        held = {name: jnp.asarray(x, dtype) for name, x in params.items()}
        self.embedder = Embed(held["model.embed_tokens.weight"])
        self.layers = nnx.List(
            Layer(config, part(held, i), tap, fault) for i in range(config.num_layers)
        )
        self.final_norm = Norm(held["model.norm.weight"], config.rms_eps)
        self.lm_head = Dense(held["lm_head.weight"])

    @nnx.jit
    def __call__(self, ids: Any) -> Any:
        x = self.embedder(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.final_norm(x))


def part(params: Params, layer: int) -> Params:
    at = f"model.layers.{layer}."
    return {n.removeprefix(at): x for n, x in params.items() if n.startswith(at)}


def scanned(config: ModelConfig, params: Params, tap: Tap) -> Callable[[Any], Any]:
    """A jitted function of ids [T], whose layers are one scan."""
    layers = [part(params, i) for i in range(config.num_layers)]
    stacked = {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}
    stacked["number"] = jnp.arange(config.num_layers)

    def layer(x: Any, w: Any) -> tuple[Any, None]:
        def heard(name: str, value: Any, axes: str | None = None) -> Any:
            return tap(name, value, axes, layer=w["number"])

        def times(x: Any, name: str) -> Any:
            return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

        normed = heard("attn_norm", norm(x, w["input_layernorm.weight"], config.rms_eps))
        q, k, v = (
            heard(f"{name}_proj", times(normed, f"self_attn.{name}_proj").reshape(*shape))
            for name, shape in {
                "q": (len(x), config.num_heads, -1),
                "k": (len(x), config.num_kv_heads, -1),
                "v": (len(x), config.num_kv_heads, -1),
            }.items()
        )
        q, k = heard("q_rope", rope(q, config, "")), heard("k_rope", rope(k, config, ""))
        attended = heard("attn_out", attend(q, k, v, config, tap, layer=w["number"]))
        x = heard("attn_residual", x + times(attended, "self_attn.o_proj"))
        normed = heard("ffn_norm", norm(x, w["post_attention_layernorm.weight"], config.rms_eps))
        act = jax.nn.silu(times(normed, "mlp.gate_proj")) * times(normed, "mlp.up_proj")
        x = heard("ffn_residual", x + times(act, "mlp.down_proj"))
        return x, None

    @jax.jit
    def forward(ids: Any) -> Any:
        x = tap("embed", jnp.asarray(params["model.embed_tokens.weight"])[tap("tokens", ids)])
        x, _ = jax.lax.scan(layer, x, stacked)
        x = tap("final_norm", norm(x, jnp.asarray(params["model.norm.weight"]), config.rms_eps))
        return tap("logits", x @ jnp.asarray(params["lm_head.weight"]).T)

    return forward


class LinenHead(linen.Module):
    """An end of a model in Linen: a norm and a head."""

    eps: float

    @linen.compact
    def __call__(self, ids: Any) -> Any:
        x = linen.Embed(61, 96, name="embed_tokens")(ids)
        x = linen.RMSNorm(epsilon=self.eps, name="norm")(x)
        return linen.Dense(61, use_bias=False, name="lm_head")(x)
