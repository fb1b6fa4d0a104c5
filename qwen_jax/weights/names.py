"""Which tensors of a checkpoint make up which parameter: one table for both formats.

Parameters are a flat dict. A linear weight is [out, in] as in the checkpoint; a fused one stacks
its sources by rows, so nothing is ever transposed.
"""

import dataclasses
from typing import Literal

from qwen_jax.config import ModelConfig

Format = Literal["gguf", "safetensors"]


@dataclasses.dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint; `shape` in the letters of `sizes`, `{i}` stands for the layer."""

    shape: tuple[str, ...]
    gguf: str
    safetensors: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter as its sources, stacked by rows. Norms compute in float32 and stay in it."""

    name: str
    sources: tuple[Source, ...]
    keep_float32: bool = False


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An `Entry` of one checkpoint: real names and sizes; `axes` are each source's in letters."""

    name: str
    shape: tuple[int, ...]
    sources: dict[str, tuple[int, ...]]
    keep_float32: bool
    axes: dict[str, tuple[str, ...]]


EMBED = Entry("embed", (Source(("V", "D"), "token_embd.weight", "model.embed_tokens.weight"),))
FINAL_NORM = Entry(
    "final_norm", (Source(("D",), "output_norm.weight", "model.norm.weight"),), keep_float32=True
)
LM_HEAD = Entry("lm_head", (Source(("V", "D"), "output.weight", "lm_head.weight"),))


def _layer(shape: tuple[str, ...], gguf: str, safetensors: str) -> Source:
    return Source(shape, f"blk.{{i}}.{gguf}", f"model.layers.{{i}}.{safetensors}")


LAYER = (
    Entry(
        "layers.{i}.attn_norm",
        (_layer(("D",), "attn_norm.weight", "input_layernorm.weight"),),
        keep_float32=True,
    ),
    Entry(
        "layers.{i}.qkv_proj.weight",
        (
            _layer(("NH", "D"), "attn_q.weight", "self_attn.q_proj.weight"),
            _layer(("KH", "D"), "attn_k.weight", "self_attn.k_proj.weight"),
            _layer(("KH", "D"), "attn_v.weight", "self_attn.v_proj.weight"),
        ),
    ),
    Entry(
        "layers.{i}.qkv_proj.bias",
        (
            _layer(("NH",), "attn_q.bias", "self_attn.q_proj.bias"),
            _layer(("KH",), "attn_k.bias", "self_attn.k_proj.bias"),
            _layer(("KH",), "attn_v.bias", "self_attn.v_proj.bias"),
        ),
    ),
    Entry(
        "layers.{i}.o_proj.weight",
        (_layer(("D", "NH"), "attn_output.weight", "self_attn.o_proj.weight"),),
    ),
    Entry(
        "layers.{i}.ffn_norm",
        (_layer(("D",), "ffn_norm.weight", "post_attention_layernorm.weight"),),
        keep_float32=True,
    ),
    Entry(
        "layers.{i}.gate_up_proj.weight",
        (
            _layer(("F", "D"), "ffn_gate.weight", "mlp.gate_proj.weight"),
            _layer(("F", "D"), "ffn_up.weight", "mlp.up_proj.weight"),
        ),
    ),
    Entry(
        "layers.{i}.down_proj.weight",
        (_layer(("D", "F"), "ffn_down.weight", "mlp.down_proj.weight"),),
    ),
)

# Tables that other programs precompute and this engine computes itself.
HARMLESS = ("rope_freqs.weight", ".rotary_emb.inv_freq")


def parameters(config: ModelConfig, file_format: Format) -> tuple[Parameter, ...]:
    """Every parameter of a model of this config, in the order a forward pass meets them."""
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.ffn_size,
        "NH": config.num_heads * config.head_dim,
        "KH": config.num_kv_heads * config.head_dim,
    }

    def resolve(entry: Entry, layer: int = 0) -> Parameter:
        axes = {
            getattr(source, file_format).format(i=layer): source.shape for source in entry.sources
        }
        sources = {name: tuple(sizes[s] for s in letters) for name, letters in axes.items()}
        shapes = list(sources.values())
        shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        return Parameter(entry.name.format(i=layer), shape, sources, entry.keep_float32, axes)

    layers = [resolve(entry, i) for i in range(config.num_layers) for entry in LAYER]
    head = [] if config.tied else [resolve(LM_HEAD)]
    return (resolve(EMBED), *layers, resolve(FINAL_NORM), *head)
