"""Hugging Face transformers as a reference: its Qwen2ForCausalLM by the recorder, any checkpoint.

Needs the extra `[hf]`. Attention is the eager one unless another is asked for: only with it do
scores and probabilities exist.
"""

import importlib.metadata
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.accuracy.traces.collecting import Collector
from qwen_jax.accuracy.traces.layout import rearrange
from qwen_jax.accuracy.traces.recording import model_hash
from qwen_jax.accuracy.traces.trace import (
    DTYPES,
    Header,
    Trace,
    axis_sizes,
    config_to_json,
    select,
)
from qwen_jax.accuracy.traces.trace import axes as trace_axes
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.recorders.dump import Dump
from qwen_jax.weights import names as checkpoint_names
from qwen_jax.weights.loader import Checkpoint, iter_parameters

try:
    import torch
    import transformers
    from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2 import modeling_qwen2

    from qwen_jax.recorders import record_torch as recorder
except ImportError as error:
    raise UserError(
        f"The reference 'hf' needs PyTorch and transformers ({error}); install them with "
        "pip install 'qwen_jax[hf]'."
    ) from None

TWICE = (
    "attn_scores are of the activations' dtype: eager attention rounds them to it before and after "
    "they are scaled. That is its arithmetic, and they are held to it; float32 scores are better."
)


def trace(
    checkpoint: Checkpoint,
    tokens: Sequence[int],
    *,
    dtype: str = "float32",
    chunks: Sequence[int] | None = None,
    names: str | Sequence[str] = "*",
    start: int = 0,
    stop: int | None = None,
    attention: str = "eager",
    skip: int = 0,
) -> Trace:
    """One text through transformers.

    Args:
        dtype: of parameters and activations: "float32", "bfloat16" or "float16".
        chunks: how many tokens each call takes; one call by default.
        names: globs over canonical names.
        start: the first position to keep.
        stop: the one after the last; the text's end by default.
        attention: transformers' `attn_implementation`.
        skip: calls up to this position are not run, so that rotations far out cost nothing:
            attention sees nothing of them.

    Raises:
        UserError: a glob matches nothing, or the positions are none of the text's.
    """
    config = checkpoint.config
    header = Header(
        model=str(checkpoint.path),
        model_sha256=model_hash(str(checkpoint.path)),
        config=config_to_json(config),
        implementation=f"transformers ({attention})",
        dtype=dtype,
        activation_dtype=dtype,
        matmul_precision="highest",
        device="cpu",
        versions={name: importlib.metadata.version(name) for name in ("transformers", "torch")},
        tokens=tuple(tokens),
        start=start,
        stop=len(tokens) if stop is None else stop,
        chunks=tuple(chunks or [len(tokens)]),
        notes=(TWICE,) if attention == "eager" and dtype != "float32" else (),
        scores_dtype=dtype if attention == "eager" else None,
    )
    collector = Collector(header, select(config, names))
    model = load(checkpoint, dtype, attention)
    cache, position = DynamicCache(config=model.config), 0
    # The argument changed its name within transformers 5.
    layer = inspect.signature(modeling_qwen2.Qwen2DecoderLayer.forward)
    keyword = "cache" if "cache" in layer.parameters else "past_key_values"
    kept = _Kept(collector)
    hooks = recorder.Recorder(model, kept)
    try:
        for length in header.chunks:
            stop = position + length
            if stop > skip:
                kept.position = position
                ids = torch.tensor([header.tokens[position:stop]])
                places = torch.arange(position, stop)[None]
                with torch.no_grad():
                    model(ids, position_ids=places, use_cache=True, **{keyword: cache})
            position = stop
    finally:
        hooks.close()
    return collector.trace()


class _Kept(Dump):
    """Takes what a recorder hears into a trace, instead of to a file.

    Attributes:
        position: of the call at hand.
    """

    def __init__(self, collector: Collector):
        self.tokens, self.chunks = [], []
        self.collector, self.position = collector, 0
        self.sizes = axis_sizes(collector.header.model_config)

    def begin(self, tokens: Sequence[int]) -> None:
        self.chunks.append(len(tokens))

    def put(
        self,
        name: str,
        array: np.ndarray,
        axes: str | Mapping[str, str],
        layer: int | None = None,
        **more: Any,
    ) -> None:
        length = self.chunks[-1]
        sizes = self.sizes | {"T": length, "S": self.position + length}
        for kind, lie in ({name: axes} if isinstance(axes, str) else axes).items():
            full = kind if layer is None else f"layers.{layer}.{kind}"
            if not self.collector.wants(full, self.position, length):
                continue
            x = array.view(DTYPES[more["dtype"]]) if "dtype" in more else array
            x = rearrange(x, lie, trace_axes(full), sizes)
            if "masked" in more:
                x = np.where(x <= more["masked"], x.dtype.type(-np.inf), x)
            self.collector.add(full, self.position, x)


def load(checkpoint: Checkpoint, dtype: str, attention: str = "eager") -> Qwen2ForCausalLM:
    """The checkpoint in transformers: a plain directory by its own reader, all else by ours.

    Raises UserError where its Qwen2 cannot do as the config says, or its reader refuses.
    """
    kind = getattr(torch, dtype)
    config = hf_config(checkpoint.config)
    transformers.utils.logging.disable_progress_bar()
    if _is_plain(checkpoint):
        try:
            model = Qwen2ForCausalLM.from_pretrained(
                checkpoint.path, dtype=kind, attn_implementation=attention, local_files_only=True
            )
        except Exception as error:  # of any type, and about this directory
            first = next(iter(str(error).splitlines()), "")
            raise UserError(
                f"{checkpoint.path}: transformers does not load it ({type(error).__name__}: "
                f"{first:.200}); correct the directory, or choose another reference."
            ) from error
    else:
        model = Qwen2ForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=dict(_state(checkpoint, kind)),
            dtype=kind,
            attn_implementation=attention,
        )
    return model.eval()


def _is_plain(checkpoint: Checkpoint) -> bool:
    """Whether transformers alone makes the same weights of it: a directory whose tensors have the
    usual names, neither packed nor changed by adapters."""
    return (
        checkpoint.format == "safetensors"
        and not checkpoint.adapters
        and all(weight.tensors == (name,) for name, weight in checkpoint.stored.items())
        and all(info.name == name for name, info in checkpoint.tensors.items())
    )


def _state(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters under transformers' names, the fused ones cut by rows."""
    sources = checkpoint_names.parameters(checkpoint.config, "safetensors")
    by_name = {parameter.name: parameter.sources for parameter in sources}
    for name, value in iter_parameters(checkpoint, "float32"):
        host, row = torch.from_numpy(np.array(value)), 0
        for source, shape in by_name[name].items():
            yield source, host[row : row + shape[0]].to(dtype)
            row += shape[0]


def hf_config(config: ModelConfig) -> Qwen2Config:
    """The config in transformers' words.

    Raises UserError where its Qwen2 cannot do as the config says.
    """
    if config.rope_dim != config.head_dim:
        raise UserError(
            f"{config.source}: {config.rope_dim} of a head's {config.head_dim} dimensions are "
            "rotated, and transformers' Qwen2 always rotates all; choose another reference."
        )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.linear_factor != 1:
        rope |= {"rope_type": "linear", "factor": config.linear_factor}
    if config.yarn:
        rope |= {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_context,
            "attention_factor": config.yarn.attention_factor,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
        }
    fields: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.context_length,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    return Qwen2Config(**fields)
