"""ModelConfig from the `qwen2.*` keys of a GGUF file, and what becomes of every such key.

The keys are those of `gguf.constants.Keys` and of llama.cpp's src/llama-arch.cpp; what they mean
to it is in its src/llama-model.cpp, `load_hparams`.
"""

import math
from collections.abc import Mapping
from typing import Any

from qwen_jax.config import ModelConfig, YarnScaling, stretched
from qwen_jax.config_table import (
    Fields,
    Neutral,
    Only,
    Rule,
    Used,
    Where,
    agreed,
    equals,
    plain,
    warn_of_ignored,
)
from qwen_jax.errors import UserError

ARCHITECTURE = "qwen2"


def no_layer_slides(window: Any, fields: Fields, config: ModelConfig) -> bool:
    """By llama.cpp's pattern: a flag a layer, or n where all but every n-th layer slide."""
    pattern = fields.values.get("attention.sliding_window_pattern")
    full = isinstance(pattern, list) and len(pattern) == config.num_layers and not any(pattern)
    return full or pattern == 1 or window == 0 or window >= config.context_length


def is_own_scale(scale: Any, fields: Fields, config: ModelConfig) -> bool:
    return scale == 0 or math.isclose(scale, config.head_dim**-0.5, rel_tol=1e-6)


def yarn_alone_extrapolates(factor: Any, fields: Fields, config: ModelConfig) -> bool:
    return factor < 0 or factor == (1 if config.yarn else 0)  # negative is unset


NO_EXPERTS = Neutral("there are no experts: expert_count is refused")
NO_WINDOW = Neutral("no layer slides: attention.sliding_window is refused where one would")
EXPERTS = Only("makes the model a mixture of experts", (0,))
LOW_RANK = Only("makes projections of two low-rank matrices", (0,))
SPARSE = Only("makes attention sparse", (0,))
OTHER_FAMILY = Only("belongs to another architecture", (0,))

TABLE: Mapping[str, Rule] = {
    # Sizes
    "block_count": Used(),
    "context_length": Used(),
    "embedding_length": Used(),
    "feed_forward_length": Used(),
    "attention.head_count": Used(),
    "attention.head_count_kv": Used(),
    "attention.key_length": Used(),
    "attention.value_length": Where(
        "gives values another size than keys", int, equals("head_dim"), "the head dimension"
    ),
    "vocab_size": Where(
        "is more than the embedding's rows",
        int,
        lambda value, _, config: value <= config.vocab_size,
        "up to that number",
    ),
    "embedding_length_out": Where(
        "changes the size of the output", int, equals("hidden_size"), "embedding_length"
    ),
    "features_length": OTHER_FAMILY,
    # Rotary embedding
    "rope.freq_base": Used(),
    "rope.dimension_count": Used(),
    "rope.scaling.type": Used(),
    "rope.scaling.factor": Used(),
    "rope.scale_linear": Used(),
    "rope.scaling.original_context_length": Used(),
    "rope.scaling.yarn_beta_fast": Used(),
    "rope.scaling.yarn_beta_slow": Used(),
    "rope.scaling.yarn_ext_factor": Where(
        "mixes frequencies", float, yarn_alone_extrapolates, "1 with YaRN, else 0"
    ),
    "rope.scaling.attn_factor": Only("scales queries and keys", (1.0,)),
    "rope.scaling.yarn_attn_factor": Only("scales queries and keys", (1.0,)),
    "rope.scaling.yarn_log_multiplier": Only("scales queries and keys", (0.0,)),
    "rope.scaling.alpha": Only("changes the frequencies", (0.0, 1.0)),
    "rope.scaling.finetuned": Neutral("says how the model was trained"),
    "rope.dimension_sections": Only("gives a token several positions (M-RoPE)", (0,)),
    "rope.dimension_count_swa": NO_WINDOW,
    "rope.freq_base_swa": NO_WINDOW,
    # Attention
    "attention.causal": Only("lets tokens see later ones", (True,)),
    "attention.scale": Where("scales the scores", float, is_own_scale, "1/sqrt(head dimension)"),
    "attention.sliding_window": Where(
        "hides early tokens", int, no_layer_slides, "a window of the whole context"
    ),
    "attention.sliding_window_pattern": NO_WINDOW,
    "attention.key_length_swa": NO_WINDOW,
    "attention.value_length_swa": NO_WINDOW,
    "attention.clamp_kqv": Only("clamps queries, keys and values", (0.0,)),
    "attention.max_alibi_bias": Only("biases the scores by distance", (0.0,)),
    "attention.output_scale": Only("scales the attention's output", (0.0, 1.0)),
    "attention.temperature_length": Only("scales the scores by position", (0,)),
    "attention.temperature_scale": Only("scales the scores by position", (0.0,)),
    "attention.relative_buckets_count": Only("biases the scores by distance", (0,)),
    "attention.shared_kv_layers": Only("makes layers share keys and values", (0,)),
    "attention.q_lora_rank": LOW_RANK,
    "attention.kv_lora_rank": LOW_RANK,
    "attention.decay_lora_rank": LOW_RANK,
    "attention.iclr_lora_rank": LOW_RANK,
    "attention.value_residual_mix_lora_rank": LOW_RANK,
    "attention.gate_lora_rank": LOW_RANK,
    "attention.key_length_mla": LOW_RANK,
    "attention.value_length_mla": LOW_RANK,
    "attention.indexer.head_count": SPARSE,
    "attention.indexer.key_length": SPARSE,
    "attention.indexer.top_k": SPARSE,
    "full_attention_interval": Only("makes most layers attend linearly", (0, 1)),
    # Norms
    "attention.layer_norm_rms_epsilon": Used(),
    "attention.layer_norm_epsilon": Neutral("there is no LayerNorm"),
    "attention.group_norm_epsilon": Neutral("there is no group norm"),
    "attention.group_norm_groups": Only("normalises by groups", (0,)),
    "swin_norm": Only("changes where the norms stand", (False,)),
    # The residual stream and the head
    "use_parallel_residual": Only("runs attention and feed-forward side by side", (False,)),
    "residual_scale": Only("scales what a layer adds", (0.0, 1.0)),
    "embedding_scale": Only("scales the embedding", (0.0, 1.0)),
    "logit_scale": Only("scales the logits", (0.0, 1.0)),
    "attn_logit_softcapping": Only("caps the scores", (0.0,)),
    "router_logit_softcapping": Only("caps the router's logits", (0.0,)),
    "final_logit_softcapping": Only("caps the logits", (0.0,)),
    "rescale_every_n_layers": Only("halves the stream every few layers", (0,)),
    "activation_sparsity_scale": Only("makes activations sparse", (0.0,)),
    "embedding_length_per_layer_input": Only("feeds every layer an embedding", (0,)),
    "altup.active_idx": OTHER_FAMILY,
    "altup.num_inputs": OTHER_FAMILY,
    "n_deepstack_layers": Only("feeds layers features of images", (0,)),
    "nextn_predict_layers": Only("adds layers that predict further tokens", (0,)),
    "tensor_data_layout": Only("permutes rows of queries and keys", ("reference",)),
    "pooling_type": Neutral("says how an embedding is made of hidden states"),
    "dense_2_feat_in": Neutral("shapes an embedding of hidden states"),
    "dense_2_feat_out": Neutral("shapes an embedding of hidden states"),
    "dense_3_feat_in": Neutral("shapes an embedding of hidden states"),
    "dense_3_feat_out": Neutral("shapes an embedding of hidden states"),
    "classifier.output_labels": Only("makes the model a classifier"),
    # Experts
    "expert_count": EXPERTS,
    "expert_used_count": EXPERTS,
    "expert_shared_count": EXPERTS,
    "expert_group_count": NO_EXPERTS,
    "expert_group_used_count": NO_EXPERTS,
    "expert_feed_forward_length": NO_EXPERTS,
    "expert_shared_feed_forward_length": NO_EXPERTS,
    "expert_chunk_feed_forward_length": NO_EXPERTS,
    "expert_weights_scale": NO_EXPERTS,
    "expert_weights_norm": NO_EXPERTS,
    "expert_gating_func": NO_EXPERTS,
    "expert_group_scale": NO_EXPERTS,
    "experts_per_group": NO_EXPERTS,
    "leading_dense_block_count": NO_EXPERTS,
    "moe_every_n_layers": NO_EXPERTS,
    "moe_latent_size": NO_EXPERTS,
    "interleave_moe_layer_step": NO_EXPERTS,
    "swiglu_clamp_exp": NO_EXPERTS,
    "swiglu_clamp_shexp": NO_EXPERTS,
    # What no decoder of this kind has
    "decoder_start_token_id": Only("makes the model an encoder with a decoder"),
    "decoder_block_count": Only("makes the model an encoder with a decoder", (0,)),
    **dict.fromkeys(
        (
            *("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"),
            *("ssm.group_count", "ssm.dt_b_c_rms", "kda.head_dim", "wkv.head_size"),
            *("posnet.embedding_length", "posnet.block_count", "shortconv.l_cache"),
            *("convnext.embedding_length", "convnext.block_count", "token_shift_count"),
            *("time_mix_extra_dim", "time_decay_extra_dim"),
        ),
        OTHER_FAMILY,
    ),
}


def read(metadata: Mapping[str, Any], *, vocab_size: int, tied: bool, source: str) -> ModelConfig:
    """The model of a GGUF file, which has no key for tying and none that must be for V.

    Args:
        metadata: the file's key-value pairs.
        vocab_size: rows of `token_embd.weight`.
        tied: whether `output.weight` is absent.
        source: the file's name, for messages.

    Raises:
        UserError: a key is missing, impossible, or asks for what this engine does not do.
    """
    architecture = plain(metadata.get("general.architecture"))
    if architecture != ARCHITECTURE:
        raise UserError(
            f"{source}: general.architecture is {architecture!r:.60}, and only 'qwen2' "
            "(Qwen2, Qwen2.5) is supported; choose a Qwen2.5 file."
        )
    label = f"{ARCHITECTURE}."
    own = {key.removeprefix(label): v for key, v in metadata.items() if key.startswith(label)}
    fields = Fields(own, TABLE, source, label)
    layers, hidden = fields.need("block_count", int), fields.need("embedding_length", int)
    heads = fields.same_in_all_layers("attention.head_count", layers)
    kv_heads = heads
    if fields.given("attention.head_count_kv"):
        kv_heads = fields.same_in_all_layers("attention.head_count_kv", layers)
    head_dim = fields.maybe("attention.key_length", int, hidden // max(heads, 1))
    context, linear, yarn = scaling(fields)
    config = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=fields.same_in_all_layers("feed_forward_length", layers),
        vocab_size=vocab_size,
        context_length=context,
        rope_theta=fields.need("rope.freq_base", float),
        rms_eps=fields.need("attention.layer_norm_rms_epsilon", float),
        tied=tied,
        yarn=yarn,
        rope_dim=fields.maybe("rope.dimension_count", int, head_dim),
        linear_factor=linear,
        source=source,
    )
    fields.check(config)
    warn_of_ignored(source, fields.ignored)
    return config


def scaling(fields: Fields) -> tuple[int, float, YarnScaling | None]:
    """The context's length, and how positions are stretched to it: a factor, or YaRN.

    Where no type is given llama.cpp takes "linear", and 0 stands for a factor or length not given.
    """
    context = fields.need("context_length", int)
    kind = fields.maybe("rope.scaling.type", str, "linear")
    spellings = ("rope.scaling.factor", "rope.scale_linear")
    factor = agreed(float, *((fields, key) for key in spellings)) or 1.0
    original = fields.maybe("rope.scaling.original_context_length", int) or context
    if kind == "none":
        unused = spellings if factor != 1 else ()
        fields.ignored += [fields.label + key for key in unused if fields.given(key)]
        return context, 1.0, None
    if kind == "linear":
        return stretched(context, factor, original), factor, None
    if kind != "yarn":
        fields.refuse(
            f"{fields.label}rope.scaling.type is {kind!r}, and only 'none', 'linear' and 'yarn' "
            "are supported; choose a plain Qwen2.5 model"
        )
    if not any(map(fields.given, spellings)):
        fields.need("rope.scaling.factor", float)
    yarn = YarnScaling.create(
        factor,
        original,
        beta_fast=fields.maybe("rope.scaling.yarn_beta_fast", float),
        beta_slow=fields.maybe("rope.scaling.yarn_beta_slow", float),
    )
    return stretched(context, factor, original), 1.0, yarn
