"""The Qwen2.5 decoder in float64 NumPy, written from the papers and not from qwen_jax.

Slow, whole-sequence, without a cache: what tests compare the engine with.
"""

from collections.abc import Mapping

import numpy as np

from qwen_jax.config import ModelConfig


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def rotate(x: np.ndarray, angles: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """`x` [..., H] with pair (i, i + R/2) turned by angles [..., R/2], times `factor`.

    The rest is unchanged. A pair is a complex number here, and turning it a multiplication by
    exp(i angle).
    """
    half = angles.shape[-1]
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * factor * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of pairs (i, i + R/2): theta^(-2i/R), slower by a linear factor.

    By YaRN (its section 3.2) the share `gamma` of a pair keeps its frequency, which depends on how
    often the pair turns in the original context, by its index as in the authors' code.
    """
    size = config.rope_dim
    plain = np.array([config.rope_theta ** (-2 * i / size) for i in range(size // 2)])
    if config.yarn is None:
        return plain / config.linear_factor
    yarn, log_theta = config.yarn, np.log(config.rope_theta)
    turns = yarn.original_context / (2 * np.pi * np.array([yarn.beta_fast, yarn.beta_slow]))
    first, last = size / 2 * np.log(turns) / log_theta
    first, last = max(np.floor(first), 0), min(np.ceil(last), size - 1)
    gamma = [1 - min(max((i - first) / max(last - first, 0.001), 0), 1) for i in range(size // 2)]
    return np.array([f * g + f / yarn.factor * (1 - g) for f, g in zip(plain, gamma, strict=True)])


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """One row: q [T, N, H] over k, v [K, S, H]; query t sees slot s where visible[t, s].

    Head by head, and only over the visible slots, so that the others may hold anything.
    """
    group = q.shape[1] // k.shape[0]
    out = np.empty(q.shape)
    for t in range(q.shape[0]):
        seen = visible[t]
        for n in range(q.shape[1]):
            weights = softmax(k[n // group, seen] @ q[t, n] / np.sqrt(q.shape[-1]))
            out[t, n] = weights @ v[n // group, seen]
    return out


def forward(
    config: ModelConfig, params: Mapping[str, np.ndarray], tokens: list[int]
) -> dict[str, np.ndarray]:
    """Every named tensor of one text, without the batch axis, from Hugging Face parameters."""
    steps, dim = len(tokens), config.head_dim
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    frequencies = rope_frequencies(config)
    # Angles alone are rounded to float32, as models are trained with: at late positions that
    # rounding outweighs all others, and no engine is to blame for it.
    angles = np.arange(steps, dtype=np.float32)[:, None, None] * frequencies.astype(np.float32)
    angles = angles.astype(np.float64)
    causal = np.tril(np.ones((steps, steps), bool))
    named: dict[str, np.ndarray] = {}

    x = named["embed"] = p["model.embed_tokens.weight"][tokens]
    for i in range(config.num_layers):
        hf, ours = f"model.layers.{i}.", f"layers.{i}."

        def linear(x: np.ndarray, name: str, hf: str = hf) -> np.ndarray:
            return x @ p[f"{hf}{name}.weight"].T + p.get(f"{hf}{name}.bias", 0)

        normed = rms_norm(x, p[f"{hf}input_layernorm.weight"], config.rms_eps)
        q, k, v = (linear(normed, f"self_attn.{n}_proj").reshape(steps, -1, dim) for n in "qkv")
        q_rope, k_rope = (rotate(y, angles, config.attention_factor) for y in (q, k))
        attended = attention(q_rope, k_rope.swapaxes(0, 1), v.swapaxes(0, 1), causal)
        attended = attended.reshape(steps, -1)
        out = linear(attended, "self_attn.o_proj")
        residual = x + out
        ffn_normed = rms_norm(residual, p[f"{hf}post_attention_layernorm.weight"], config.rms_eps)
        gate, up = linear(ffn_normed, "mlp.gate_proj"), linear(ffn_normed, "mlp.up_proj")
        act = gate / (1 + np.exp(-gate)) * up
        down = linear(act, "mlp.down_proj")
        x = residual + down
        tensors = {
            "attn_norm": normed, "q_proj": q, "k_proj": k, "v_proj": v, "q_rope": q_rope,
            "k_rope": k_rope, "attn_out": attended, "o_proj": out, "attn_residual": residual,
            "ffn_norm": ffn_normed, "gate_proj": gate, "up_proj": up, "ffn_act": act,
            "down_proj": down, "ffn_residual": x,
        }  # fmt: skip
        named |= {f"{ours}{name}": value for name, value in tensors.items()}
    head = p["model.embed_tokens.weight" if config.tied else "lm_head.weight"]
    named["final_norm"] = rms_norm(x, p["model.norm.weight"], config.rms_eps)
    named["logits"] = named["final_norm"] @ head.T
    return named
