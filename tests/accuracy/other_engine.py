"""An engine that is not ours, and two faults that a public one shipped together.

Whole sequence, NumPy, float32, heads before positions, q, k and v in one array: what a newcomer
brings who has another engine and its dumped tensors. It shares no code with qwen_jax.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwen_jax.config import ModelConfig

MAPPING = {
    "embed": "tok",
    "layers.{i}.attn_norm": "blk{i}/norm1",
    "layers.{i}.q_proj": {"from": "blk{i}/qkv", "axes": "T ([N]+K+K H)"},
    "layers.{i}.k_proj": {"from": "blk{i}/qkv", "axes": "T (N+[K]+K H)"},
    "layers.{i}.v_proj": {"from": "blk{i}/qkv", "axes": "T (N+K+[K] H)"},
    "layers.{i}.q_rope": {"from": "blk{i}/q", "axes": "N T H"},
    "layers.{i}.k_rope": {"from": "blk{i}/k", "axes": "K T H"},
    "layers.{i}.attn_scores": {"from": "blk{i}/kq", "axes": "N T S", "masked": -1e9},
    "layers.{i}.attn_out": {"from": "blk{i}/attn", "axes": "T (N H)"},
    "layers.{i}.attn_residual": "blk{i}/mid",
    "layers.{i}.ffn_norm": "blk{i}/norm2",
    "layers.{i}.gate_proj": {"from": "blk{i}/gate_up", "axes": "T [F]+F"},
    "layers.{i}.up_proj": {"from": "blk{i}/gate_up", "axes": "T F+[F]"},
    "layers.{i}.ffn_residual": "blk{i}/out",
    "logits": "logits",
}


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps)) * weight


def rope(x: np.ndarray, theta: float, interleaved: bool) -> np.ndarray:
    """x [heads, T, H]; dimensions (2i, 2i + 1) or (i, i + H/2) turn together."""
    _, steps, dim = x.shape
    angles = np.outer(np.arange(steps), theta ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def dump(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, np.ndarray],
    tokens: list[int],
    *,
    biases: bool,
    interleaved: bool,
) -> None:
    """Runs a text and writes every array as .npy, and the mapping file."""
    arrays: dict[str, np.ndarray] = {}
    p, steps, dim = params, len(tokens), config.head_dim
    embed = p["model.embed_tokens.weight"]
    x = arrays["tok"] = embed[tokens]
    mask = np.where(np.tri(steps, dtype=bool), 0, np.float32(-1e9))
    for i in range(config.num_layers):
        at = f"model.layers.{i}."
        normed = arrays[f"blk{i}/norm1"] = norm(x, p[f"{at}input_layernorm.weight"], config.rms_eps)
        projected = []
        for name in "qkv":
            out = normed @ p[f"{at}self_attn.{name}_proj.weight"].T
            projected.append(out + p[f"{at}self_attn.{name}_proj.bias"] if biases else out)
        arrays[f"blk{i}/qkv"] = np.concatenate(projected, axis=1)
        q, k, v = (y.reshape(steps, -1, dim).transpose(1, 0, 2) for y in projected)
        q, k = (rope(y, config.rope_theta, interleaved) for y in (q, k))
        arrays[f"blk{i}/q"], arrays[f"blk{i}/k"] = q, k
        k, v = (np.repeat(y, config.group_size, axis=0) for y in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(dim)) + mask
        arrays[f"blk{i}/kq"] = scores
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (weights / weights.sum(-1, keepdims=True)) @ v
        arrays[f"blk{i}/attn"] = attended = attended.transpose(1, 0, 2).reshape(steps, -1)
        x = arrays[f"blk{i}/mid"] = x + attended @ p[f"{at}self_attn.o_proj.weight"].T
        second = p[f"{at}post_attention_layernorm.weight"]
        normed = arrays[f"blk{i}/norm2"] = norm(x, second, config.rms_eps)
        gate, up = (normed @ p[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        arrays[f"blk{i}/gate_up"] = np.concatenate([gate, up], axis=1)
        act = gate / (1 + np.exp(-gate)) * up
        x = arrays[f"blk{i}/out"] = x + act @ p[f"{at}mlp.down_proj.weight"].T
    head = embed if config.tied else p["lm_head.weight"]
    arrays["logits"] = norm(x, p["model.norm.weight"], config.rms_eps) @ head.T
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    mapping = {"version": 1, "dtype": "float32", "tensors": MAPPING}
    (folder / "mapping.json").write_text(json.dumps(mapping, indent=2))
