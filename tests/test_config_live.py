"""Rotary settings against transformers as it is installed: linear scaling, YaRN, partial rotation.

And every field that transformers knows of is in the table of `config.json`.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="live parity needs pip install '.[hf]'")
pytest.importorskip("transformers", reason="live parity needs pip install '.[hf]'")

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from qwen_jax import config_hf, config_hf_rope
from qwen_jax.config import ModelConfig, YarnScaling
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError
from qwen_jax.model.rotary import inverse_frequencies
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests import transformers_reference
from tests.engines import decoded_logprobs, device_parameters, relative
from tests.golden_cases import Case, odd_config
from tests.numpy_reference import log_softmax
from tests.test_config import from_hf
from tests.tiny_checkpoints import canonical, hf_config, write_gguf, write_hf

pytestmark = pytest.mark.live

FLOAT32_BOUND = 1e-5
SEED = int(np.random.default_rng([int(os.environ["QWEN_JAX_LIVE_SEED"]), 3]).integers(2**31))

SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0},
    ),
    "linear, the words of transformers 5 and of old llama.cpp": (
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
        {"qwen2.rope.scale_linear": 4.0},
    ),
    "YaRN without original length": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0},
    ),
}
"""The same settings in config.json and in a GGUF file."""


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_scaled_context(tmp_path: Path, name: str) -> None:
    """512 tokens through a context of 160: transformers reads the directory, we both files."""
    hf, gguf = SPELLINGS[name]
    case = Case(odd_config(num_layers=2, context_length=160), SEED)
    params, prompt = case.parameters(), case.prompt()
    directory = write_hf(tmp_path / "hf", case.config, params, **hf).path
    file = write_gguf(tmp_path / "model.gguf", case.config, params, metadata=gguf).path
    reference = AutoModelForCausalLM.from_pretrained(
        directory, dtype="float32", attn_implementation="eager"
    ).eval()
    theirs = transformers_reference.logits(reference, prompt)
    first, second = (open_checkpoint(path) for path in (directory, file))
    # One and the same 1e-6 is a float32 in a GGUF file.
    assert dataclasses.replace(second.config, rms_eps=1e-6) == first.config
    assert first.config.context_length == 640
    engine = Engine(first.config, load_parameters(second, "float32"))
    assert relative(engine.logits(prompt), theirs) <= FLOAT32_BOUND
    plain = transformers_reference.model(case.config, params)
    assert relative(transformers_reference.logits(plain, prompt), theirs) > 0.1


def test_a_partial_rotation_is_phi_3s() -> None:
    """transformers' Qwen2 always turns whole heads; Phi-3 is Qwen2 but for that and the biases,
    which its linear layers take when they are given some."""
    case = Case(odd_config(num_layers=2, rope_dim=12, tied=False), SEED)
    config, params = case.config, case.parameters()
    reference = phi_3(config, params)
    tokens = case.prompt()
    theirs = transformers_reference.logits(reference, tokens)
    engine = Engine(config, device_parameters(params, "float32"))
    assert relative(engine.logits(tokens), theirs) <= FLOAT32_BOUND
    assert relative(decoded_logprobs(engine, tokens), log_softmax(theirs)) <= FLOAT32_BOUND


def phi_3(config: ModelConfig, params: dict[str, np.ndarray]) -> Any:
    theirs = Phi3ForCausalLM._from_config(
        Phi3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.rms_eps,
            rope_theta=config.rope_theta,
            partial_rotary_factor=config.rope_dim / config.head_dim,
            pad_token_id=0,
        ),
        attn_implementation="eager",
    )
    names = {
        "embed": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "lm_head": "lm_head.weight",
        "attn_norm": "input_layernorm.weight",
        "ffn_norm": "post_attention_layernorm.weight",
        "qkv_proj": "self_attn.qkv_proj",
        "o_proj": "self_attn.o_proj",
        "gate_up_proj": "mlp.gate_up_proj",
        "down_proj": "mlp.down_proj",
    }
    state = {}
    for name, value in canonical(params).items():
        *layer, kind = name.replace("layers.", "").split(".", 1)
        prefix = f"model.layers.{layer[0]}." if layer else ""
        module, _, suffix = kind.partition(".")
        state[prefix + ".".join(filter(None, (names[module], suffix)))] = torch.from_numpy(value)
    for i, block in enumerate(theirs.model.layers):
        bias = state.pop(f"model.layers.{i}.self_attn.qkv_proj.bias")
        block.self_attn.qkv_proj.bias = torch.nn.Parameter(bias)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("qkv_proj.bias") for name in missing)
    return theirs.float().eval()


@pytest.mark.parametrize("part", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_frequencies_of_a_part_of_the_head(kind: str, part: float) -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(10):
        factor, dim = float(rng.uniform(1, 40)), int(rng.choice([64, 128]))
        theta = 10 ** rng.uniform(3, 7)
        sizes = {"head_dim": dim, "rope_dim": int(part * dim), "rope_theta": theta}
        if kind == "linear":
            config = odd_config(linear_factor=factor, **sizes)
        else:
            config = odd_config(yarn=YarnScaling.create(factor, 4096), **sizes)
        theirs = Qwen2Config(**hf_config(config))
        expected, attention_factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
        np.testing.assert_allclose(inverse_frequencies(config), expected.numpy(), rtol=1e-6)
        assert config.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_what_transformers_saves_is_read_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ({}, {"linear_factor": 2.0}, {"yarn": YarnScaling.create(4.0, 512)})
    for config in (odd_config(context_length=2048, **changes) for changes in settings):
        saved = Qwen2Config(**hf_config(config))
        saved.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        for fields in (written, saved.to_dict(), saved.to_diff_dict()):
            assert from_hf(fields) == config
    from_hf(Qwen2Config().to_dict())
    assert not caplog.records


def test_the_table_has_every_field_of_transformers() -> None:
    fields = {*Qwen2Config().to_dict(), *GenerationConfig._get_default_generation_params()}
    assert fields <= config_hf.TABLE.keys()
    assert RopeParameters.__annotations__.keys() <= config_hf_rope.TABLE.keys()


def test_transformers_refuses_a_linear_scaling_without_a_factor() -> None:
    """And ignores a factor without a type, which we refuse."""
    plain = hf_config(odd_config())
    with pytest.raises(Exception, match="factor"):
        Qwen2Config(**plain | {"rope_scaling": {"type": "linear"}})
    ignored = Qwen2Config(**plain | {"rope_scaling": {"factor": 4.0}})
    assert ignored.rope_parameters["rope_type"] == "default"
    with pytest.raises(UserError, match="no rope_type, so transformers ignores it"):
        from_hf(plain | {"rope_scaling": {"factor": 4.0}})
