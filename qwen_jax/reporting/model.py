"""What a model is, in lines."""

from collections.abc import Iterator

from qwen_jax.config import ModelConfig
from qwen_jax.weights.loader import Checkpoint


def described(checkpoint: Checkpoint) -> dict[str, str]:
    """Names and values for the top of a report."""
    stored = ", ".join(f"{count} {name}" for name, count in checkpoint.quantization.items())
    found = {"model": str(checkpoint.path), "stored as": f"{checkpoint.format}, {stored}"}
    if checkpoint.adapters:
        found["adapters"] = ", ".join(map(str, checkpoint.adapters))
    return found | {"sizes": "; ".join(model_lines(checkpoint.config))}


def model_lines(config: ModelConfig) -> Iterator[str]:
    yield f"{config.num_parameters:,} parameters"
    yield (
        f"{config.num_layers} layers, hidden size {config.hidden_size}, feed-forward "
        f"{config.ffn_size}, vocabulary {config.vocab_size} ({'tied' if config.tied else 'untied'})"
    )
    yield (
        f"{config.num_heads} query heads on {config.num_kv_heads} key/value heads of "
        f"{config.head_dim}"
    )
    yield (
        f"context {config.context_length}, rope theta {config.rope_theta:g}, "
        f"RMSNorm eps {config.rms_eps:g}"
    )
    if config.rope_dim != config.head_dim:
        yield f"rotary embedding of the first {config.rope_dim} dimensions of a head"
    if config.linear_factor != 1:
        yield f"linear rope scaling, positions divided by {config.linear_factor:g}"
    if config.yarn:
        yield (
            f"YaRN factor {config.yarn.factor:g} over {config.yarn.original_context}, "
            f"attention factor {config.yarn.attention_factor:.4f}"
        )
