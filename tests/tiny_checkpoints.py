"""Tiny random Qwen2 checkpoints for tests: one parameter dict, written as GGUF or Hugging Face.

Parameters carry Hugging Face names (`model.layers.0.self_attn.q_proj.weight`, ...), so that they
are also a transformers state dict; `canonical` fuses them into qwen_jax's own names. Both writers
return a `Written` with the values the file really holds, decoded by a library that is not ours.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGUFEndian

from qwen_jax.config import ModelConfig

Parameters = dict[str, np.ndarray]

# Hugging Face name -> GGUF name, as llama.cpp's converter writes them for qwen2.
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}

# Where a block keeps its float16 scale and minimum: for the types that gguf can only decode.
_SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


@dataclasses.dataclass(frozen=True)
class Written:
    """A checkpoint on disk: the path to open, and its values in float32 by Hugging Face name."""

    path: Path
    parameters: Parameters


def tiny_config(**changes: Any) -> ModelConfig:
    """Odd sizes on purpose: N/K is 3, and the heads' total width is not the hidden size."""
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 256,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 32,
        "ffn_size": 512,
        "vocab_size": 320,
        "context_length": 1024,
        "rope_theta": 1e6,
        "rms_eps": 1e-6,
        "tied": True,
    }
    return ModelConfig(**(sizes | changes))


def random_parameters(config: ModelConfig, seed: int = 0) -> Parameters:
    """Random float32 parameters: large biases, norm weights away from one, logits of order one."""
    rng = np.random.default_rng(seed)
    d, f, v = config.hidden_size, config.ffn_size, config.vocab_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def normal(*shape: int, scale: float) -> np.ndarray:
        return rng.normal(0, scale, shape).astype(np.float32)

    def linear(rows: int, columns: int) -> np.ndarray:
        return normal(rows, columns, scale=columns**-0.5)

    def norm() -> np.ndarray:
        return 1 + normal(d, scale=0.3)

    params = {"model.embed_tokens.weight": normal(v, d, scale=1.5 * d**-0.5)}
    for i in range(config.num_layers):
        layer = {
            "input_layernorm.weight": norm(),
            "self_attn.q_proj.weight": linear(q, d),
            "self_attn.q_proj.bias": normal(q, scale=0.5),
            "self_attn.k_proj.weight": linear(kv, d),
            "self_attn.k_proj.bias": normal(kv, scale=0.5),
            "self_attn.v_proj.weight": linear(kv, d),
            "self_attn.v_proj.bias": normal(kv, scale=0.5),
            "self_attn.o_proj.weight": linear(d, q),
            "post_attention_layernorm.weight": norm(),
            "mlp.gate_proj.weight": linear(f, d),
            "mlp.up_proj.weight": linear(f, d),
            "mlp.down_proj.weight": linear(d, f),
        }
        params |= {f"model.layers.{i}.{name}": value for name, value in layer.items()}
    params["model.norm.weight"] = norm()
    if not config.tied:
        params["lm_head.weight"] = normal(v, d, scale=1.5 * d**-0.5)
    return params


def canonical(params: Mapping[str, np.ndarray]) -> Parameters:
    """The same parameters under qwen_jax's names: q, k, v and gate, up fused by rows."""
    fused = {
        "embed": params["model.embed_tokens.weight"],
        "final_norm": params["model.norm.weight"],
    }
    if "lm_head.weight" in params:
        fused["lm_head"] = params["lm_head.weight"]
    num_layers = sum(name.endswith(".input_layernorm.weight") for name in params)
    for i in range(num_layers):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        for kind in ("weight", "bias"):
            qkv = [params[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            fused[f"{new}qkv_proj.{kind}"] = np.concatenate(qkv)
        gate_up = [params[f"{old}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        fused[f"{new}gate_up_proj.weight"] = np.concatenate(gate_up)
        fused[f"{new}attn_norm"] = params[f"{old}input_layernorm.weight"]
        fused[f"{new}ffn_norm"] = params[f"{old}post_attention_layernorm.weight"]
        fused[f"{new}o_proj.weight"] = params[f"{old}self_attn.o_proj.weight"]
        fused[f"{new}down_proj.weight"] = params[f"{old}mlp.down_proj.weight"]
    return fused


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{GGUF_LAYER_NAMES[rest]}"


def gguf_metadata(config: ModelConfig) -> dict[str, Any]:
    """The `qwen2.*` keys llama.cpp's converter writes; int means uint32, float means float32."""
    keys: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": int(config.context_length / config.linear_factor),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "rope.freq_base": float(config.rope_theta),
        "attention.layer_norm_rms_epsilon": float(config.rms_eps),
    }
    if config.head_dim * config.num_heads != config.hidden_size:
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if config.rope_dim != config.head_dim:
        keys["rope.dimension_count"] = config.rope_dim
    if config.linear_factor != 1:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.linear_factor}
    if config.yarn:
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(config.yarn.factor),
            "rope.scaling.original_context_length": config.yarn.original_context,
            "rope.scaling.yarn_beta_fast": float(config.yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": float(config.yarn.beta_slow),
        }
    return {f"qwen2.{key}": value for key, value in keys.items()}


def random_blocks(
    rng: np.random.Generator, shape: tuple[int, ...], kind: GGMLQuantizationType, scale: float
) -> np.ndarray:
    """Random uint8 blocks of a row-major `shape` whose values have RMS about `scale`."""
    block, size = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
    byte_shape = (*shape[:-1], shape[-1] // block * size)

    def set_scale(value: float) -> None:
        half = np.float16(value)
        if kind.name == "NVFP4":  # one unsigned e4m3 byte per 16 values; 8 steps double it
            raw[:, :4] = np.clip(56 + np.round(8 * np.log2(value)), 1, 126)
        elif kind.name == "IQ1_M":  # a nibble of the scale atop each of four 16-bit words
            words = raw[:, 48:].view("<u2")
            nibbles = (int(half.view(np.uint16)) >> np.array([0, 4, 8, 12])) & 0xF
            words[:] = (words & 0x0FFF) | (nibbles << 12).astype(np.uint16)
        else:
            for offset in _SCALES.get(kind.name, (0,)):
                raw[:, offset : offset + 2] = np.frombuffer(half.tobytes(), np.uint8)

    set_scale(1.0)
    values = gguf.quants.dequantize(raw, kind)
    set_scale(scale / float(np.sqrt(np.mean(values**2))))
    return raw.reshape(byte_shape)


def encode(
    values: np.ndarray, kind: GGMLQuantizationType, rng: np.random.Generator
) -> tuple[np.ndarray, GGMLQuantizationType]:
    """`values` as raw blocks; a row that `kind` cannot hold falls back to Q8_0, then to F16.

    gguf cannot encode k- and i-quants; for those the blocks are random, of the values' RMS.
    """
    row = values.shape[-1]
    if row % GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.Q8_0 if row % 32 == 0 else GGMLQuantizationType.F16
    try:
        return gguf.quants.quantize(values, kind), kind
    except NotImplementedError:
        rms = float(np.sqrt(np.mean(values**2)))
        return random_blocks(rng, values.shape, kind, rms), kind


def write_gguf(
    path: Path,
    config: ModelConfig,
    params: Mapping[str, np.ndarray],
    *,
    types: str | Mapping[str, str] = "F32",
    metadata: Mapping[str, Any] | None = None,
    split_max_tensors: int = 0,
    endian: GGUFEndian = GGUFEndian.LITTLE,
    seed: int = 0,
) -> Written:
    """Writes a GGUF file with gguf's own writer.

    Args:
        types: the type of every matrix ("Q4_K"), or of each by Hugging Face name (F32 where
            absent); vectors are always F32.
        metadata: further key-value pairs, such as a tokenizer's; None drops a default key.
        split_max_tensors: more tensors than this per file make a split checkpoint.
    """
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, "qwen2", endianess=endian, split_max_tensors=split_max_tensors)
    for key, value in (gguf_metadata(config) | dict(metadata or {})).items():
        _add(writer, key, value)
    held = {}
    for name, values in params.items():
        wanted = types if isinstance(types, str) else types.get(name, "F32")
        kind = GGMLQuantizationType[wanted if values.ndim > 1 else "F32"]
        raw, kind = encode(values, kind, rng)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
        held[name] = gguf.quants.dequantize(raw, kind).reshape(values.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(writer.format_shard_names(path)[0], held)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else list(value))


def hf_config(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    """`config.json` in the words of the released checkpoints."""
    hf: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": int(config.context_length / config.linear_factor),
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    if config.rope_dim != config.head_dim:
        hf["partial_rotary_factor"] = config.rope_dim / config.head_dim
    if config.linear_factor != 1:
        hf["rope_scaling"] = {"type": "linear", "factor": config.linear_factor}
    if config.yarn:
        hf["rope_scaling"] = {
            "type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_context,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
        }
    return hf | changes


def write_hf(
    directory: Path,
    config: ModelConfig,
    params: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    shards: int = 1,
    **config_changes: Any,
) -> Written:
    """Writes `config.json` and safetensors (with an index when there are several shards)."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {name: np.ascontiguousarray(value.astype(stored)) for name, value in params.items()}
    text = json.dumps(hf_config(config, torch_dtype=dtype, **config_changes), indent=2)
    (directory / "config.json").write_text(text, encoding="utf-8")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in list(tensors)[shard::shards]}
            save_file(part, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": weight_map,
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return Written(directory, {name: t.astype(np.float32) for name, t in tensors.items()})
