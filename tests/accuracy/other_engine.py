"""An engine that is not ours, two faults that a public one shipped together, and more.

Whole sequence, NumPy, heads before positions, q, k and v in one array: what a newcomer
brings who has another engine and its dumped tensors. It shares no code with qwen_jax.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(dtype).astype(np.float32)


def visible(steps: int, fault: str) -> np.ndarray:
    """Which slots each position sees."""
    if fault == "mask_one_ahead":
        return np.tri(steps, k=1, dtype=bool)
    if fault == "mask_one_behind":
        return np.tri(steps, k=-1, dtype=bool) | (np.arange(steps * steps).reshape(steps, -1) == 0)
    if fault == "sink_window":
        recent = np.tri(steps, dtype=bool) & ~np.tri(steps, k=-8, dtype=bool)
        return recent | (np.tri(steps, dtype=bool) & (np.arange(steps) < 4))
    return np.tri(steps, dtype=bool)


def run(
    config: ModelConfig,
    params: Mapping[str, np.ndarray],
    tokens: list[int],
    *,
    biases: bool = True,
    interleaved: bool = False,
    fault: str = "",
    dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """Every array of a text, with one more fault by its name in the catalogue.

    Args:
        dtype: to which matrices, biases and results are rounded, but not scores.
    """
    arrays: dict[str, np.ndarray] = {}
    kept = {"weights_bf16": "bfloat16", "weights_f16": "float16"}.get(fault, dtype)
    p = {k: v if "norm" in k else narrow(v, kept) for k, v in params.items()}
    steps, dim, eps = len(tokens), config.head_dim, config.rms_eps
    eps = 1e-5 if fault == "norm_eps_1e-5" else eps

    def put(name: str, x: np.ndarray) -> np.ndarray:
        arrays[name] = narrow(x, dtype)
        return arrays[name]

    def times(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        if fault == "products_f16":
            x, weight = narrow(x, "float16"), narrow(weight, "float16")
        return x @ weight.T

    def rotate(y: np.ndarray) -> np.ndarray:
        if fault == "rope_part_of_head":
            half = rope(y[..., : dim // 2], config.rope_theta, interleaved)
            return np.concatenate([half, y[..., dim // 2 :]], -1)
        return rope(y, config.rope_theta, interleaved)

    def scored(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        scale, scores = np.float32(np.sqrt(dim)), q @ k.transpose(0, 2, 1)
        if fault.startswith("scores"):
            kind = "bfloat16" if "bf16" in fault else "float16"
            scores = narrow(scores, kind) if fault.endswith("twice") else scores
            return narrow(scores / scale, kind)
        return scores / scale

    embed = p["model.embed_tokens.weight"]
    x = put("tok", embed[tokens])
    mask = np.where(visible(steps, fault), 0, np.float32(-1e9))
    for i in range(config.num_layers):
        layer = {0: 1, 1: 0}.get(i, i) if fault == "layers_exchanged" else i
        at = f"model.layers.{layer}."
        normed = put(f"blk{i}/norm1", norm(x, p[f"{at}input_layernorm.weight"], eps))
        projected = []
        for name in "qkv":
            out = times(normed, p[f"{at}self_attn.{name}_proj.weight"])
            projected.append(out + p[f"{at}self_attn.{name}_proj.bias"] if biases else out)
        qkv = put(f"blk{i}/qkv", np.concatenate(projected, axis=1))
        ends = np.cumsum([y.shape[1] for y in projected])[:-1]
        q, k, v = (
            y.reshape(steps, -1, dim).transpose(1, 0, 2) for y in np.split(qkv, ends, axis=1)
        )
        q, k = put(f"blk{i}/q", rotate(q)), put(f"blk{i}/k", rotate(k))
        k, v = (np.repeat(y, config.group_size, axis=0) for y in (k, v))
        scores = arrays[f"blk{i}/kq"] = scored(q, k) + mask
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        total = total + np.exp(-top) if fault == "softmax_sink" else total
        attended = narrow(weights / total, dtype) @ v
        attended = put(f"blk{i}/attn", attended.transpose(1, 0, 2).reshape(steps, -1))
        out = narrow(times(attended, p[f"{at}self_attn.o_proj.weight"]), dtype)
        x = put(f"blk{i}/mid", x + out)
        normed = put(f"blk{i}/norm2", norm(x, p[f"{at}post_attention_layernorm.weight"], eps))
        gate, up = (times(normed, p[f"{at}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        both = put(f"blk{i}/gate_up", np.concatenate([gate, up], axis=1))
        gate, up = np.split(both, 2, axis=1)
        act = narrow(gate / (1 + np.exp(-gate)) * up, dtype)
        out = narrow(times(act, p[f"{at}mlp.down_proj.weight"]), dtype)
        x = put(f"blk{i}/out", x + out)
    head = embed if config.tied else p["lm_head.weight"]
    normed = narrow(norm(x, p["model.norm.weight"], eps), dtype)
    put("logits", times(normed, head))
    return arrays


def dump(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, np.ndarray],
    tokens: list[int],
    **wrong: Any,
) -> None:
    """Runs a text and writes every array as .npy, and the mapping file."""
    for name, array in run(config, params, tokens, **wrong).items():
        path = folder / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    mapping = {"version": 1, "dtype": wrong.get("dtype", "float32"), "tensors": MAPPING}
    (folder / "mapping.json").write_text(json.dumps(mapping, indent=2))
