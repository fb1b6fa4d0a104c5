"""Hugging Face transformers as a reference: its Qwen2ForCausalLM through hooks, any checkpoint.

Needs the extra `[hf]`. Attention is the eager one unless another is asked for: only with it do
scores and probabilities exist.
"""

import contextlib
import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np

from qwen_jax.accuracy.traces.collecting import Collector
from qwen_jax.accuracy.traces.recording import model_hash
from qwen_jax.accuracy.traces.trace import Header, Trace, config_to_json, select
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.weights import names as checkpoint_names
from qwen_jax.weights.loader import Checkpoint, iter_parameters

try:
    import torch
    import transformers
    from torch.overrides import TorchFunctionMode
    from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2 import modeling_qwen2
except ImportError as error:
    raise UserError(
        f"The reference 'hf' needs PyTorch and transformers ({error}); install them with "
        "pip install 'qwen_jax[hf]'."
    ) from None

Hear = Callable[[str, torch.Tensor], None]

OUTPUTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "o_proj",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "gate_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "down_proj",
    "": "ffn_residual",
}
"""Modules of a layer whose output is a tensor of ours."""

INPUTS = {
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "attn_residual",
    "mlp.down_proj": "ffn_act",
}
"""Modules whose input is one."""


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
    for length in header.chunks:
        stop = position + length
        ids = torch.tensor([header.tokens[position:stop]])
        hear = functools.partial(_collect, collector, position, length)
        if stop > skip:
            with torch.no_grad(), listening(model, hear):
                places = torch.arange(position, stop)[None]
                model(ids, position_ids=places, use_cache=True, **{keyword: cache})
        position = stop
    return collector.trace()


def _collect(collector: Collector, position: int, length: int, name: str, x: torch.Tensor) -> None:
    if collector.wants(name, position, length):
        array = canonical(name, x, collector.header.model_config.head_dim, position)
        collector.add(name, position, array)


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


@contextlib.contextmanager
def listening(model: Qwen2ForCausalLM, hear: Hear) -> Iterator[None]:
    """Tells `hear` every canonical name and tensor that the model computes inside."""
    handles = []

    def output(module: torch.nn.Module, name: str) -> None:
        def hook(module: torch.nn.Module, args: tuple, out: torch.Tensor) -> None:
            hear(name, out)

        handles.append(module.register_forward_hook(hook))

    def entering(module: torch.nn.Module, name: str) -> None:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            hear(name, args[0])

        handles.append(module.register_forward_pre_hook(hook))

    output(model.model.embed_tokens, "embed")
    for i, layer in enumerate(model.model.layers):
        for path, name in OUTPUTS.items():
            output(layer.get_submodule(path), f"layers.{i}.{name}")
        for path, name in INPUTS.items():
            entering(layer.get_submodule(path), f"layers.{i}.{name}")
    output(model.model.norm, "final_norm")
    output(model.lm_head, "logits")

    chosen, others = model.config._attn_implementation, modeling_qwen2.ALL_ATTENTION_FUNCTIONS
    attend = others.get(chosen, modeling_qwen2.eager_attention_forward)

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        prefix = f"layers.{module.layer_idx}."
        hear(prefix + "q_rope", query)
        hear(prefix + "k_rope", key[:, :, -query.shape[2] :])
        with _Softmax(lambda x: hear(prefix + "attn_scores", x)):
            out, probs = attend(module, query, key, *args, **more)
        if probs is not None:
            hear(prefix + "attn_probs", probs)
        return out, probs

    try:
        # The eager function is reached through its module's name only, others through a table.
        with patch.object(modeling_qwen2, "eager_attention_forward", attention):
            if chosen in others:
                others[chosen] = attention
            yield
    finally:
        if chosen in others:
            others[chosen] = attend
        for handle in handles:
            handle.remove()


class _Softmax(TorchFunctionMode):
    """Tells what goes into a softmax."""

    def __init__(self, hear: Callable[[torch.Tensor], None]):
        super().__init__()
        self.hear = hear

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        if func is torch.nn.functional.softmax:
            self.hear(args[0])
        return func(*args, **(kwargs or {}))


def canonical(name: str, x: torch.Tensor, head_dim: int, position: int) -> np.ndarray:
    """A hooked tensor with our axes and masks, a copy.

    Args:
        position: of the first query.
    """
    kind = name.split(".")[-1]
    x = x.detach()[0]
    if kind in ("q_rope", "k_rope", "attn_scores", "attn_probs"):
        x = x.transpose(0, 1)  # transformers has heads before positions
    elif kind in ("q_proj", "k_proj", "v_proj"):
        x = x.unflatten(-1, (-1, head_dim))
    if x.dtype == torch.bfloat16:
        array = x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        array = x.numpy()
    if kind == "attn_scores":
        # transformers adds the dtype's least number where a query must not see a key.
        future = np.arange(array.shape[-1]) > position + np.arange(len(array))[:, None, None]
        masked = future & (array <= ml_dtypes.finfo(array.dtype).min / 2)
        return np.where(masked, array.dtype.type(-np.inf), array)
    return array.copy()
