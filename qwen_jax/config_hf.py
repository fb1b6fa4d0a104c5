"""ModelConfig from a Hugging Face `config.json`, and what becomes of every field of it.

The fields are those of transformers' Qwen2Config and PreTrainedConfig (4 and 5), the generation
settings that version 4 wrote beside them, and those of other families that people meet.
"""

from collections.abc import Mapping
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.config_hf_rope import ROPES, mapping, rotated, stretching
from qwen_jax.config_table import (
    Fields,
    Neutral,
    Only,
    Rule,
    Used,
    Where,
    agreed,
    equals,
    warn_of_ignored,
)
from qwen_jax.errors import UserError


def window(fields: Fields, config: ModelConfig) -> int:
    """Tokens that a layer which slides would see; the context where the window is none."""
    if "sliding_window" in fields.values and not fields.given("sliding_window"):
        return config.context_length
    return fields.maybe("sliding_window", int, 4096)  # transformers' default


def no_layer_slides(use: bool, fields: Fields, config: ModelConfig) -> bool:
    """Layers from max_window_layers on slide, as in transformers; layer_types overrules it."""
    if not use or fields.given("layer_types"):
        return True
    first = fields.maybe("max_window_layers", int, 28)  # transformers' default
    return first >= config.num_layers or window(fields, config) >= config.context_length


def all_layers_are_full(types: list[Any], fields: Fields, config: ModelConfig) -> bool:
    """Or would slide beyond the context alone, and are rotated as the others."""
    kinds = ["full_attention"]
    own_rope = any("sliding_attention" in (fields.values.get(name) or ()) for name in ROPES)
    wide = fields.given("sliding_window") and window(fields, config) >= config.context_length
    if wide and not own_rope:
        kinds.append("sliding_attention")
    return len(types) == config.num_layers and all(kind in kinds for kind in types)


TEXT = Neutral("of the text, not of the model")
GENERATION = Neutral("a default of generate()")
TRAINING = Neutral("acts in training only")
BOOKKEEPING = Neutral("says where the file comes from or how transformers runs it")
LABELS = Neutral("names classes; a classifier's head is a tensor, and refused")
WINDOW = Neutral("acts through use_sliding_window and layer_types")
NO_EXPERTS = Neutral("there are no experts: their number is refused")
EXPERTS = Only("makes the model a mixture of experts", (0,))
BOTH_WAYS = Only("lets tokens see later ones", (False,))
OTHER_MODALITY = Only("makes it a model of images or sound")
ENCODER = Only("makes the model an encoder with a decoder", (False,))
OWN_BIASES = Only("takes the biases of queries, keys and values away", (True,))
OTHER_BIASES = Only("adds biases", (False,))
SCALE = Only("scales what the layers pass on", (1.0,))
CAP = Only("caps the scores or the logits", (0.0,))
QK_NORM = Only("normalises queries and keys", (False,))

TABLE: Mapping[str, Rule] = {
    "model_type": Used(),
    # Sizes
    "hidden_size": Used(),
    "intermediate_size": Used(),
    "max_position_embeddings": Used(),
    "num_attention_heads": Used(),
    "num_hidden_layers": Used(),
    "num_key_value_heads": Used(),
    "head_dim": Used(),
    "vocab_size": Used(),
    "rms_norm_eps": Used(),
    "tie_word_embeddings": Used(),
    "hidden_act": Only("is another activation", ("silu", "swish")),
    "hidden_activation": Only("is another activation", ("silu", "swish")),
    "layer_norm_eps": Neutral("there is no LayerNorm"),
    "layer_norm_epsilon": Neutral("there is no LayerNorm"),
    # Weights
    "quantization_config": Used("weights"),
    "quantization": Only("quantises weights"),
    "compression_config": Used("weights"),
    # Rotary embedding
    "rope_parameters": Used(),
    "rope_scaling": Used(),
    "rope_theta": Used(),
    "partial_rotary_factor": Used(),
    "original_max_position_embeddings": Used(),
    "rotary_pct": Only("turns a part of every head", (1.0,)),
    "rotary_dim": Where(
        "turns a part of every head", int, equals("rope_dim"), "what partial_rotary_factor says"
    ),
    "rotary_emb_base": Where(
        "is another rope_theta", float, equals("rope_theta"), "the value of rope_theta"
    ),
    "position_embedding_type": Only("positions tokens otherwise", ("rope", "rotary")),
    "rope_interleaved": Only("pairs neighbouring dimensions", (False,)),
    "rope_interleave": Only("pairs neighbouring dimensions", (False,)),
    "use_mrope": Only("gives a token several positions", (False,)),
    "use_dynamic_ntk": Only("changes frequencies with the length", (False,)),
    "use_logn_attn": Only("scales the scores by position", (False,)),
    "no_rope_layers": Only("leaves layers without rotary embedding", (1,)),
    "alibi": Only("biases the scores by distance", (False,)),
    # Attention
    "use_sliding_window": Where("hides early tokens", bool, no_layer_slides, "false"),
    "layer_types": Where(
        "hides early tokens or changes layers",
        list,
        all_layers_are_full,
        "'full_attention' in every layer",
    ),
    "sliding_window": WINDOW,
    "max_window_layers": WINDOW,
    "dual_chunk_attention_config": Used(),
    "is_causal": Only("lets tokens see later ones", (True,)),
    "causal": Only("lets tokens see later ones", (True,)),
    "use_bidirectional_attention": BOTH_WAYS,
    "bidirectional": BOTH_WAYS,
    "attention_bias": OWN_BIASES,
    "qkv_bias": OWN_BIASES,
    "use_qkv_bias": OWN_BIASES,
    "attention_out_bias": OTHER_BIASES,
    "mlp_bias": OTHER_BIASES,
    "lm_head_bias": OTHER_BIASES,
    "qk_norm": QK_NORM,
    "use_qk_norm": QK_NORM,
    "qk_layernorm": QK_NORM,
    "clip_qkv": Only("clamps queries, keys and values"),
    "query_pre_attn_scalar": Where(
        "scales the scores", float, equals("head_dim"), "the head dimension"
    ),
    "attention_multiplier": Where(
        "scales the scores",
        float,
        lambda value, _, config: abs(value * config.head_dim**0.5 - 1) < 1e-6,
        "1/sqrt(head dimension)",
    ),
    "scale_attn_by_inverse_layer_idx": Only("scales the scores by layer", (False,)),
    # The residual stream and the head
    "attn_logit_softcapping": CAP,
    "final_logit_softcapping": CAP,
    "router_logit_softcapping": CAP,
    "logit_scale": SCALE,
    "logits_scaling": SCALE,
    "lm_head_multiplier": SCALE,
    "embedding_multiplier": SCALE,
    "embedding_scale": SCALE,
    "residual_multiplier": SCALE,
    "residual_scale": SCALE,
    "scale_emb": SCALE,
    "scale_depth": Only("scales what the layers pass on"),
    "scale_embedding": Only("scales the embedding", (False,)),
    "parallel_attn": Only("runs attention and feed-forward side by side", (False,)),
    "use_parallel_residual": Only("runs attention and feed-forward side by side", (False,)),
    "num_nextn_predict_layers": Only("adds layers that predict further tokens", (0,)),
    "per_layer_config": Only("gives layers their own sizes"),
    "pruned_heads": Only("removes heads"),
    # Experts
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": EXPERTS,
    "num_experts_per_tok": EXPERTS,
    **dict.fromkeys(
        (
            *("moe_intermediate_size", "shared_expert_intermediate_size", "decoder_sparse_step"),
            *("mlp_only_layers", "norm_topk_prob", "output_router_logits", "router_aux_loss_coef"),
        ),
        NO_EXPERTS,
    ),
    # Models of which the text is a part
    **dict.fromkeys(
        ("text_config", "vision_config", "audio_config", "thinker_config", "talker_config"),
        OTHER_MODALITY,
    ),
    "is_encoder_decoder": ENCODER,
    "add_cross_attention": ENCODER,
    "cross_attention_hidden_size": Only("makes the model an encoder with a decoder"),
    "is_decoder": Neutral("a decoder is what this is"),
    "tie_encoder_decoder": Neutral("there is no encoder"),
    # What changes no number
    **dict.fromkeys(
        (
            *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"),
            *("decoder_start_token_id", "tokenizer_class", "prefix", "task_specific_params"),
            *("model_max_length", "max_sequence_length", "seq_length"),
        ),
        TEXT,
    ),
    **dict.fromkeys(
        (
            *("use_cache", "do_sample", "temperature", "top_k", "top_p", "typical_p", "min_p"),
            *("max_length", "min_length", "max_new_tokens", "num_beams", "num_beam_groups"),
            *("num_return_sequences", "early_stopping", "length_penalty", "diversity_penalty"),
            *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size"),
            *("encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
            *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
            *("exponential_decay_length_penalty", "remove_invalid_values", "output_scores"),
            *("return_dict_in_generate", "epsilon_cutoff", "eta_cutoff", "target_lookbehind"),
            *("assistant_confidence_threshold", "assistant_lookbehind", "num_assistant_tokens"),
            "num_assistant_tokens_schedule",
        ),
        GENERATION,
    ),
    **dict.fromkeys(
        (
            *("attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attn_pdrop"),
            *("embd_pdrop", "resid_pdrop", "attention_probs_dropout_prob", "classifier_dropout"),
            *("initializer_range", "gradient_checkpointing", "neftune_noise_alpha"),
            *("tf_legacy_loss", "pretraining_tp"),
        ),
        TRAINING,
    ),
    **dict.fromkeys(
        (
            *("architectures", "transformers_version", "_name_or_path", "name_or_path"),
            *("_commit_hash", "torch_dtype", "dtype", "use_bfloat16", "torchscript"),
            *("return_dict", "output_attentions", "output_hidden_states", "tie_last_hidden_states"),
            *("chunk_size_feed_forward", "attn_implementation", "_attn_implementation"),
            *("_attn_implementation_autoset", "_attn_implementation_internal"),
            *("_experts_implementation", "experts_implementation", "_flash_attn_2_enabled"),
            *("_experts_implementation_internal", "use_flash_attn", "transformers_weights"),
            *("unsloth_fixed", "unsloth_version", "model_name", "transformers.js_config"),
        ),
        BOOKKEEPING,
    ),
    **dict.fromkeys(
        ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"), LABELS
    ),
}


def read(config: Mapping[str, Any], *, source: str) -> ModelConfig:
    """The model of a `config.json`.

    Raises:
        UserError: a field is missing, impossible, or asks for what this engine does not do.
    """
    if config.get("model_type") != "qwen2":
        raise UserError(
            f"{source}: model_type is {config.get('model_type')!r}, and only 'qwen2' "
            "(Qwen2, Qwen2.5) is supported; choose a Qwen2.5 checkpoint."
        )
    fields = Fields(config, TABLE, source)
    hidden, heads = fields.need("hidden_size", int), fields.need("num_attention_heads", int)
    head_dim = fields.maybe("head_dim", int, hidden // max(heads, 1))
    ropes = [mapping(fields, name) for name in ROPES if fields.values.get(name) not in (None, {})]
    theta = agreed(float, *((at, "rope_theta") for at in (fields, *ropes)))
    scaling = stretching(fields, ropes)
    null = "num_key_value_heads" in config and not fields.given("num_key_value_heads")
    model = ModelConfig(
        num_layers=fields.need("num_hidden_layers", int),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads if null else fields.need("num_key_value_heads", int),
        head_dim=head_dim,
        ffn_size=fields.need("intermediate_size", int),
        vocab_size=fields.need("vocab_size", int),
        context_length=unchunked(fields, scaling.context),
        rope_theta=fields.need("rope_theta", float) if theta is None else theta,
        rms_eps=fields.need("rms_norm_eps", float),
        tied=fields.maybe("tie_word_embeddings", bool, False),
        yarn=scaling.yarn,
        rope_dim=rotated(fields, ropes, head_dim),
        linear_factor=scaling.linear_factor,
        source=source,
    )
    fields.check(model)
    warn_of_ignored(source, fields.ignored)
    return model


def unchunked(fields: Fields, context: int) -> int:
    """The part of the context that dual chunk attention (An et al., 2024) leaves as it is.

    That is one chunk; transformers runs the checkpoints that have it without.
    """
    chunks = fields.maybe("dual_chunk_attention_config", dict)
    if not chunks:
        return context
    sizes = Fields(chunks, {}, fields.source, "dual_chunk_attention_config.")
    return min(context, sizes.need("chunk_size", int) - sizes.maybe("local_size", int, 0))
