"""Writes the demo model as one GGUF file, with the keys and names llama.cpp's converter uses."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from qwen_jax.config import ModelConfig
from qwen_jax.text.vocabulary import Vocabulary
from tools.demo_tokenizer import END_OF_TEXT, TURN_END

DESCRIPTION = (
    "A small model of the Qwen2.5 architecture that writes haiku containing a given word. "
    "Trained by tools/train_demo.py of qwen_jax on text that the script generates; "
    "it shares no weights with Qwen2.5."
)


def write(
    path: Path, config: ModelConfig, params: Mapping[str, np.ndarray], vocabulary: Vocabulary
) -> None:
    """Q8_0 matrices, float32 norms and biases.

    Args:
        params: float32 arrays by canonical name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "qwen2")
    _add_model_keys(writer, config)
    _add_tokenizer_keys(writer, vocabulary)
    for name, values in gguf_tensors(config, params).items():
        kind = GGMLQuantizationType.Q8_0 if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(config: ModelConfig, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters under GGUF's names, with q, k, v and gate, up taken apart."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors = {
        "token_embd.weight": params["embed"],
        "output_norm.weight": params["final_norm"],
    }
    for i in range(config.num_layers):
        old, new = f"layers.{i}.", f"blk.{i}."
        for kind in ("weight", "bias"):
            parts = np.split(params[f"{old}qkv_proj.{kind}"], [q, q + kv])
            for letter, part in zip("qkv", parts, strict=True):
                tensors[f"{new}attn_{letter}.{kind}"] = part
        gate, up = np.split(params[f"{old}gate_up_proj.weight"], 2)
        tensors |= {
            f"{new}attn_norm.weight": params[f"{old}attn_norm"],
            f"{new}attn_output.weight": params[f"{old}o_proj.weight"],
            f"{new}ffn_norm.weight": params[f"{old}ffn_norm"],
            f"{new}ffn_gate.weight": gate,
            f"{new}ffn_up.weight": up,
            f"{new}ffn_down.weight": params[f"{old}down_proj.weight"],
        }
    return tensors


def _add_model_keys(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_type("model")
    writer.add_name("qwen_jax haiku")
    writer.add_description(DESCRIPTION)
    writer.add_license("apache-2.0")
    writer.add_size_label(f"{config.num_parameters / 1e6:.1f}M")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_sizes(writer, config)


def add_sizes(writer: GGUFWriter, config: ModelConfig) -> None:
    """The `qwen2.*` keys, as llama.cpp's converter writes them."""
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)


def _add_tokenizer_keys(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    tokens = list(vocabulary.ids)
    kinds = (
        TokenType.CONTROL if i in vocabulary.added else TokenType.NORMAL for i in range(len(tokens))
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(list(kinds))
    writer.add_token_merges([f"{left} {right}" for left, right in vocabulary.merges])
    writer.add_eos_token_id(vocabulary.ids[TURN_END])
    writer.add_pad_token_id(vocabulary.ids[END_OF_TEXT])
    # As in Qwen's own files: named, and never to be added.
    writer.add_bos_token_id(vocabulary.ids[END_OF_TEXT])
    writer.add_add_bos_token(False)
    writer.add_chat_template(vocabulary.chat_templates["default"])
