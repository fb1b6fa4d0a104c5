"""ModelConfig of every released size, from both formats, and every refusal."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from qwen_jax import config_gguf, config_hf
from qwen_jax.config import ModelConfig, YarnScaling
from qwen_jax.errors import UserError
from tests.tiny_checkpoints import gguf_metadata, hf_config, random_parameters, tiny_config

# L, D, N, K, H, F, V, tied, and the parameters that the published safetensors hold.
SIZES = {
    "0.5B": (24, 896, 14, 2, 64, 4864, 151_936, True, 494_032_768),
    "1.5B": (28, 1536, 12, 2, 128, 8960, 151_936, True, 1_543_714_304),
    "3B": (36, 2048, 16, 2, 128, 11008, 151_936, True, 3_085_938_688),
    "7B": (28, 3584, 28, 4, 128, 18944, 152_064, False, 7_615_616_512),
    "14B": (48, 5120, 40, 8, 128, 13824, 152_064, False, 14_770_033_664),
    "32B": (64, 5120, 40, 8, 128, 27648, 152_064, False, 32_763_876_352),
    "72B": (80, 8192, 64, 8, 128, 29568, 152_064, False, 72_706_203_648),
}


def released_hf(size: str, **changes: Any) -> dict[str, Any]:
    """config.json as released, with the keys that must not matter."""
    layers, hidden, heads, kv_heads, _, ffn, vocab, tied, _ = SIZES[size]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 32768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
    } | changes


def released_gguf(size: str, **changes: Any) -> dict[str, Any]:
    """The keys llama.cpp's converter writes; there is none for the head dimension."""
    layers, hidden, heads, kv_heads, _, ffn, _, _, _ = SIZES[size]
    return {
        "general.architecture": "qwen2",
        "qwen2.block_count": layers,
        "qwen2.context_length": 32768,
        "qwen2.embedding_length": hidden,
        "qwen2.feed_forward_length": ffn,
        "qwen2.attention.head_count": heads,
        "qwen2.attention.head_count_kv": kv_heads,
        "qwen2.rope.freq_base": 1e6,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
    } | {f"qwen2.{key.replace('__', '.')}": value for key, value in changes.items()}


def from_gguf(metadata: dict[str, Any], **sizes: Any) -> ModelConfig:
    given = {"vocab_size": 151_936, "tied": True} | sizes
    return config_gguf.read(metadata, **given, source="model.gguf")


def from_hf(config: dict[str, Any]) -> ModelConfig:
    # As it is read: through JSON.
    return config_hf.read(json.loads(json.dumps(config)), source="config.json")


@pytest.mark.parametrize("size", SIZES)
def test_released_sizes(size: str) -> None:
    layers, hidden, heads, kv_heads, dim, ffn, vocab, tied, parameters = SIZES[size]
    config = from_hf(released_hf(size))
    assert config == ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        ffn_size=ffn,
        vocab_size=vocab,
        context_length=32768,
        rope_theta=1e6,
        rms_eps=1e-6,
        tied=tied,
    )
    assert config == from_gguf(released_gguf(size), vocab_size=vocab, tied=tied)
    assert config.num_parameters == parameters
    assert config.group_size == heads // kv_heads


def test_num_parameters_counts_what_there_is() -> None:
    for tied in (True, False):
        config = tiny_config(tied=tied)
        arrays = random_parameters(config).values()
        assert config.num_parameters == sum(x.size for x in arrays)


def test_both_formats_of_an_odd_model_agree() -> None:
    config = tiny_config(yarn=YarnScaling.create(4.0, 256, beta_fast=16.0))
    metadata = gguf_metadata(config) | {"general.architecture": "qwen2"}
    assert from_gguf(metadata, vocab_size=320) == from_hf(hf_config(config)) == config
    assert config.head_dim * config.num_heads != config.hidden_size


# ---- YaRN


def test_yarn_of_the_model_cards() -> None:
    """What the cards of 7B and larger tell users to add, in the old words and the new."""
    expected = YarnScaling(
        factor=4.0, original_context=32768, attention_factor=0.1 * math.log(4) + 1
    )
    words = {"factor": 4.0, "original_max_position_embeddings": 32768}
    old = from_hf(released_hf("7B", rope_scaling=words | {"type": "yarn"}))
    new = released_hf("7B", rope_parameters=words | {"rope_type": "yarn", "rope_theta": 1e6})
    del new["rope_theta"]
    assert old == from_hf(new)
    assert old.yarn == expected
    assert old.context_length == 131072


def test_yarn_settings_are_taken_over() -> None:
    words = {
        "type": "yarn",
        "factor": 2,
        "original_max_position_embeddings": 1000,
        "attention_factor": 1.5,
        "beta_fast": 16,
        "beta_slow": 2.0,
    }
    expected = YarnScaling(2.0, 1000, 1.5, beta_fast=16.0, beta_slow=2.0)
    config = from_hf(released_hf("7B", rope_scaling=words, max_position_embeddings=4000))
    assert config.yarn == expected
    assert config.context_length == 4000


def test_yarn_without_stretching_has_no_attention_factor() -> None:
    assert YarnScaling.create(1.0, 32768).attention_factor == 1


def test_no_scaling_in_its_several_words() -> None:
    plain = from_hf(released_hf("0.5B"))
    assert plain == from_hf(released_hf("0.5B", rope_scaling=None))
    new = {"rope_type": "default", "rope_theta": 1e6}
    assert plain == from_hf(released_hf("0.5B", rope_parameters=new, rope_scaling=None))
    assert from_gguf(released_gguf("0.5B", rope__scaling__type="none")) == plain


# ---- Refusals


def refusal(read: Any, *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(*args)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 300
    assert message.startswith(("model.gguf: ", "config.json: "))
    return message


def test_other_architectures_are_refused() -> None:
    for name in ("llama", "qwen2moe", "qwen3", None):
        metadata = released_gguf("0.5B") | {"general.architecture": name}
        assert f"general.architecture is {name!r}" in refusal(from_gguf, metadata)
        assert f"model_type is {name!r}" in refusal(from_hf, released_hf("0.5B", model_type=name))


def test_arrays_where_a_gguf_file_has_one_value() -> None:
    """NumPy makes neither true nor false of what they are compared with."""
    full = np.array([1, 2], "u4")
    for key in ("general.architecture", "qwen2.expert_count"):
        for value in (full, [full], [full[:0], full]):
            assert f"{key} is [" in refusal(from_gguf, released_gguf("0.5B") | {key: value})


GGUF_KEYS = [key for key in released_gguf("0.5B") if key.startswith("qwen2.")]
HF_KEYS = [
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
]


@pytest.mark.parametrize("key", [k for k in GGUF_KEYS if not k.endswith("head_count_kv")])
def test_a_missing_gguf_key_is_named(key: str) -> None:
    metadata = released_gguf("0.5B")
    del metadata[key]
    assert f"the key {key!r} is missing" in refusal(from_gguf, metadata)


def test_without_kv_heads_gguf_means_one_per_query_head() -> None:
    metadata = released_gguf("0.5B")
    del metadata["qwen2.attention.head_count_kv"]
    assert from_gguf(metadata).num_kv_heads == 14


@pytest.mark.parametrize("key", HF_KEYS)
def test_a_missing_hf_key_is_named(key: str) -> None:
    config = released_hf("0.5B")
    del config[key]
    assert f"the key {key!r} is missing" in refusal(from_hf, config)


@pytest.mark.parametrize("value", ["896", True, [896], None, {}])
def test_a_key_of_another_type_is_refused(value: Any) -> None:
    absent = value is None  # and so as many key/value heads as query heads
    for key in set(GGUF_KEYS) - ({"qwen2.attention.head_count_kv"} if absent else set()):
        message = refusal(from_gguf, released_gguf("0.5B") | {key: value})
        assert f"the key {key!r} holds {value!r}, not " in message
    for key in set(HF_KEYS) - ({"num_key_value_heads"} if absent else set()):
        message = refusal(from_hf, released_hf("0.5B", **{key: value}))
        assert f"the key {key!r} holds {value!r}, not " in message


def test_without_kv_heads_hf_means_one_per_query_head() -> None:
    assert from_hf(released_hf("0.5B", num_key_value_heads=None)).num_kv_heads == 14


def test_fractions_of_a_size_are_refused() -> None:
    assert "holds 24.5, not int" in refusal(from_hf, released_hf("0.5B", num_hidden_layers=24.5))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 0}, "num_layers is 0, but it must be at least 1"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000, but it must be at most 10000"),
        ({"max_position_embeddings": 2**31}, "is 2147483648, but it must be at most 2147483647"),
        ({"vocab_size": -1}, "vocab_size is -1, but it must be at least 1"),
        ({"num_attention_heads": 0}, "num_heads is 0, but it must be at least 1"),
        ({"num_key_value_heads": 0}, "num_kv_heads is 0, but it must be at least 1"),
        ({"max_position_embeddings": 0}, "context_length is 0, but it must be at least 1"),
        ({"num_key_value_heads": 4}, "num_kv_heads is 4, but it must divide the 14 query heads"),
        ({"num_key_value_heads": 28}, "num_kv_heads is 28, but it must divide the 14"),
        ({"head_dim": 63}, "head_dim is 63, but it must be even"),
        ({"head_dim": "64"}, "'head_dim' holds '64', not int"),
        ({"head_dim": 0}, "head_dim is 0, but it must be at least 1"),
        ({"head_dim": -64}, "head_dim is -64, but it must be at least 1"),
        ({"rope_theta": 0}, "rope_theta is 0.0, but it must be a finite number above 1"),
        ({"rope_theta": math.inf}, "'rope_theta' holds inf, not a finite number"),
        ({"rope_theta": math.nan}, "'rope_theta' holds nan, not a finite number"),
        ({"rms_norm_eps": 0}, "rms_eps is 0.0, but it must lie between 0 and 1"),
        ({"rms_norm_eps": math.nan}, "'rms_norm_eps' holds nan, not a finite number"),
        ({"rms_norm_eps": 2}, "rms_eps is 2.0, but"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', and no mapping"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' holds 'no', not bool"),
        ({"tie_word_embeddings": 0}, "'tie_word_embeddings' holds 0, not bool"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(changes: dict[str, Any], says: str) -> None:
    assert says in refusal(from_hf, released_hf("0.5B", **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"factor": 0.5}, "rope_scaling"),
        ({"factor": 0}, "rope_scaling"),
        ({"factor": -4}, "rope_scaling"),
        ({"factor": math.nan}, "'rope_scaling.factor' holds nan, not a finite number"),
        ({"factor": math.inf}, "'rope_scaling.factor' holds inf, not a finite number"),
        ({"factor": "4"}, "'rope_scaling.factor' holds '4', not float"),
        ({"factor": None}, "'rope_scaling.factor' holds None, not float"),
        ({"original_max_position_embeddings": 0}, "rope_scaling"),
        ({"beta_fast": "fast"}, "'rope_scaling.beta_fast' holds 'fast', not float"),
        ({"beta_slow": 0}, "rope_scaling"),
        ({"beta_slow": 64}, "needs a positive attention_factor and betas"),
        ({"attention_factor": math.nan}, "'rope_scaling.attention_factor' holds nan"),
        ({"attention_factor": -1}, "rope_scaling"),
    ],
    ids=str,
)
def test_impossible_yarn_is_refused(changes: dict[str, Any], says: str) -> None:
    words = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768} | changes
    assert says in refusal(from_hf, released_hf("7B", rope_scaling=words))


def test_gguf_yarn_extends_the_context() -> None:
    keys = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32768,
    }
    config = from_gguf(released_gguf("7B") | keys)
    assert config.context_length == 131072
    # A multiplier of one on the paper's attention factor changes nothing; another is unknown.
    assert from_gguf(released_gguf("7B") | keys | {"qwen2.rope.scaling.attn_factor": 1.0}) == config
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        metadata = released_gguf("7B") | keys | {f"qwen2.rope.scaling.{key}": 0.5}
        assert f"{key} is 0.5, which " in refusal(from_gguf, metadata)


def test_numpy_numbers_do_not_pass_for_python_ones() -> None:
    """A reader that hands out NumPy scalars would make configs that are not hashable alike."""
    assert "not int" in refusal(from_gguf, released_gguf("0.5B", block_count=np.uint32(24)))


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().num_layers = 3  # type: ignore[misc]
