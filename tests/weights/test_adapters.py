"""LoRA adapters: merged weights against W + scale B A in float64, and what is not plain LoRA."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from absl import logging
from safetensors.numpy import load_file, save_file

from qwen_jax import opening
from qwen_jax.errors import UserError
from qwen_jax.weights.loader import load_parameters
from tests.quantised_checkpoints import gptq, write_quantised
from tests.tiny_adapters import Pairs, random_pairs, write_gguf_lora, write_peft
from tests.tiny_checkpoints import (
    Written,
    canonical,
    random_parameters,
    tiny_config,
    write_gguf,
    write_hf,
)

CONFIG = tiny_config(hidden_size=64, ffn_size=96, head_dim=16, vocab_size=48, tied=False)
PARAMS = random_parameters(CONFIG)
PAIRS = random_pairs(PARAMS)
ENDS = random_pairs(PARAMS, targets=("lm_head", "embed_tokens"), seed=1)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
UNIT = 2.0**-24


def assert_merged(
    written: Written,
    adapters: Path | list[Path],
    changes: list[tuple[Pairs, Callable[[str], float]]],
) -> None:
    """Loaded weights against the sum in float64, within what float32 can lose of its terms."""
    right, bound = {}, {}
    for name, value in written.parameters.items():
        total, size, terms = value.astype(np.float64), np.abs(value.astype(np.float64)), 1
        for pairs, scale in changes:
            if name in pairs:
                left, low = (x.astype(np.float64) for x in pairs[name])
                total = total + scale(name) * (left @ low)
                size = size + scale(name) * (np.abs(left) @ np.abs(low))
                terms += left.shape[1] + 2
        right[name], bound[name] = total, UNIT * terms * size
    loaded = load_parameters(opening.open_model(written.path, adapters), "float32")
    expected, limit = canonical(right), canonical(bound)
    assert loaded.keys() == expected.keys()
    for name, values in expected.items():
        assert (np.abs(np.asarray(loaded[name], np.float64) - values) <= limit[name]).all(), name


def test_one_adapter(tmp_path):
    base = write_hf(tmp_path / "base", CONFIG, PARAMS)
    adapter = write_peft(tmp_path / "a", PAIRS)
    assert_merged(base, adapter, [(PAIRS, lambda name: 8 / 4)])


def test_rank_stabilised(tmp_path):
    base = write_hf(tmp_path / "base", CONFIG, PARAMS)
    adapter = write_peft(tmp_path / "a", PAIRS, use_rslora=True, lora_alpha=3)
    assert_merged(base, adapter, [(PAIRS, lambda name: 3 / math.sqrt(4))])


def test_patterns_of_ranks_and_alphas(tmp_path):
    """As in peft: the first pattern that fits the end of a module's name, from a dot on."""
    base = write_hf(tmp_path / "base", CONFIG, PARAMS)
    pairs = PAIRS | random_pairs(PARAMS, 2, ("v_proj",)) | random_pairs(PARAMS, 3, ("1.mlp.up",))
    adapter = write_peft(
        tmp_path / "a",
        pairs,
        r=4,
        rank_pattern={"v_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        alpha_pattern={"roj": 99, "self_attn.q_proj": 5, "model.layers.0.mlp.down_proj": 7},
    )

    def scale(name: str) -> float:
        alpha = 5 if "q_proj" in name else 7 if "layers.0.mlp.down" in name else 8
        return alpha / pairs[name][1].shape[0]

    assert_merged(base, adapter, [(pairs, scale)])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_adapters_are_merged_in_float32(tmp_path, dtype):
    base = write_hf(tmp_path / "base", CONFIG, PARAMS, dtype="bfloat16")
    adapter = write_peft(tmp_path / "a", PAIRS, dtype=dtype)
    held = {name: tuple(x.astype(dtype) for x in pair) for name, pair in PAIRS.items()}
    assert_merged(base, adapter, [(held, lambda name: 2.0)])


def test_several_adapters_add_up_on_any_base(tmp_path):
    other = random_pairs(PARAMS, 2, ("q_proj", "o_proj", "lm_head", "embed"), seed=3)
    peft = write_peft(tmp_path / "a", PAIRS)
    lora = write_gguf_lora(tmp_path / "b.gguf", other, alpha=6.0)
    changes = [(PAIRS, lambda name: 2.0), (other, lambda name: 3.0)]
    types = {Q_PROJ: "Q8_0", HEAD: "Q4_0"}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    for base in (
        write_gguf(tmp_path / "base.gguf", CONFIG, PARAMS, types=types),
        write_hf(tmp_path / "base", CONFIG, PARAMS, dtype="float16"),
        write_quantised(tmp_path / "quantised", CONFIG, PARAMS, gptq(), settings),
    ):
        assert_merged(base, [peft, lora], changes)


def test_a_gguf_adapter_without_alpha_is_added_as_it_is(tmp_path):
    base = write_gguf(tmp_path / "base.gguf", CONFIG, PARAMS)
    lora = write_gguf_lora(tmp_path / "a.gguf", PAIRS, alpha=None)
    assert_merged(base, lora, [(PAIRS, lambda name: 1.0)])


def test_rounding_comes_after_the_merge(tmp_path):
    base = write_hf(tmp_path / "base", CONFIG, PARAMS)
    adapter = write_peft(tmp_path / "a", PAIRS)
    checkpoint = opening.open_model(base.path, adapter)
    wide, narrow = (load_parameters(checkpoint, dtype) for dtype in ("float32", "bfloat16"))
    for name, values in wide.items():
        rounded = np.asarray(values).astype(narrow[name].dtype)
        np.testing.assert_array_equal(np.asarray(narrow[name]), rounded)


@pytest.mark.parametrize("changed", [EMBED, HEAD])
@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_a_tied_head_becomes_a_weight_of_its_own(tmp_path, changed, suffix):
    """The model that peft runs: an update of the embedding leaves the head, and vice versa."""
    config = dataclasses.replace(CONFIG, tied=True)
    params = {name: value for name, value in PARAMS.items() if name != HEAD}
    write = write_gguf if suffix else write_hf
    base = write(tmp_path / f"base{suffix}", config, params)
    pairs = {changed: ENDS[changed]}
    adapter = write_peft(tmp_path / "a", pairs)
    checkpoint = opening.open_model(base.path, adapter)
    assert not checkpoint.config.tied
    assert checkpoint.config.num_parameters - opening.open_model(
        base.path
    ).config.num_parameters == (48 * 64)
    untied = Written(base.path, base.parameters | {HEAD: base.parameters[EMBED]})
    assert_merged(untied, adapter, [(pairs, lambda name: 2.0)])


def test_weights_that_come_whole(tmp_path):
    """modules_to_save, biases and norms that were trained, and an embedding saved beside."""
    base = write_hf(tmp_path / "base", CONFIG, PARAMS)
    bias, norm = Q_PROJ.replace("weight", "bias"), "model.layers.1.input_layernorm.weight"
    rng = np.random.default_rng(5)
    new = {
        name: rng.normal(size=PARAMS[name].shape).astype(np.float32)
        for name in (bias, norm, EMBED, HEAD)
    }
    names = {
        bias: bias.replace(".bias", ".base_layer.bias"),
        norm: norm,
        EMBED: EMBED.replace(".weight", ".base_layer.weight"),
        HEAD: HEAD.replace(".weight", ".modules_to_save.weight"),
    }
    more = {f"base_model.model.{names[name]}": value for name, value in new.items()}
    pairs = PAIRS | {EMBED: ENDS[EMBED]}
    adapter = write_peft(tmp_path / "a", pairs, more=more, modules_to_save=["lm_head"], bias="all")
    changed = Written(base.path, base.parameters | new)
    assert_merged(changed, adapter, [(pairs, lambda name: 2.0)])
    other = write_peft(tmp_path / "b", PAIRS, more=more)
    assert_merged(changed, [adapter, other], [(pairs, lambda n: 2.0), (PAIRS, lambda n: 2.0)])
    more = {name: value + 1 for name, value in more.items()}
    write_peft(other, PAIRS, more=more)
    assert "does with other values; give only one" in refusal(base.path, [adapter, other], other)


def test_values_that_are_not_finite(tmp_path):
    """Who brings them is not said, but who may."""
    base = write_hf(tmp_path / "base", CONFIG, PARAMS).path
    left, right = PAIRS[Q_PROJ]
    adapter = write_peft(tmp_path / "a", {Q_PROJ: (np.where(left > 0, np.inf, left), right)})
    with pytest.raises(UserError) as caught:
        load_parameters(opening.open_model(base, adapter), "float32")
    assert str(caught.value).startswith(
        f"{base / 'model.safetensors'} and {adapter / 'adapter_model.safetensors'}: the weight "
        f"{Q_PROJ!r} has values that are not finite"
    )


def test_nothing_of_the_model_is_copied(tmp_path):
    """The update of a row takes no more than these rows and the update's own matrices."""
    checkpoint = opening.open_model(
        write_hf(tmp_path / "base", CONFIG, PARAMS).path, write_peft(tmp_path / "a", PAIRS)
    )
    weight = checkpoint.stored[Q_PROJ]
    assert weight.rows(3, 5).shape == (2, 64)
    assert checkpoint.quantization["F32+LoRA"] == len(PAIRS)
    assert checkpoint.adapters == (tmp_path / "a",)


def refusal(model: Path, adapters: Any, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        opening.open_model(model, adapters)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message
    return message


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_hf(tmp_path_factory.mktemp("base"), CONFIG, PARAMS).path


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "use_dora is True, and DoRA also changes the length of each row"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is [1, 2]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is [3]"),
        ({"target_parameters": ["x"]}, "target_parameters is ['x']"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', and the"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"r": 8}, "have the shapes (96, 4) and (4, 64), but adapter_config.json says rank 8"),
        ({"r": "4"}, "r is '4' for 'model.layers.0.self_attn.q_proj', not a positive number"),
        ({"lora_alpha": None}, "lora_alpha is None for 'model.layers.0.self_attn.q_proj'"),
        ({"lora_alpha": 10**400}, "for 'model.layers.0.self_attn.q_proj', not a number"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern is {'(': 4}, and '(' is no pattern"),
        ({"rank_pattern": [4]}, "rank_pattern is [4], and it must be a mapping"),
    ],
)
def test_configs_that_are_refused(base, tmp_path, config, problem):
    adapter = write_peft(tmp_path, {Q_PROJ: PAIRS[Q_PROJ]}, **config)
    assert problem in refusal(base, adapter, tmp_path)


def test_fields_that_nobody_knows_are_told(base, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    opening.open_model(base, write_peft(tmp_path, PAIRS, use_next_lora=True, other=None))
    assert said == [f"{tmp_path / 'adapter_config.json'}: use_next_lora is not known here and was "
                    "not used"]  # fmt: skip


@pytest.mark.parametrize(
    ("pairs", "more", "problem"),
    [
        (
            {Q_PROJ.replace("0", "9", 1): PAIRS[Q_PROJ]},
            {},
            "changes 'model.layers.9.self_attn.q_proj.weight', which",
        ),
        ({"score.weight": PAIRS[Q_PROJ]}, {}, "it changes 'score.weight', which"),
        ({Q_PROJ: (PAIRS[Q_PROJ][0][:32], PAIRS[Q_PROJ][1])}, {}, "has the shape (32, 64), but"),
        (PAIRS, {"lora_magnitude_vector": np.ones(96, "f")}, "is no part of plain LoRA; merge"),
        (PAIRS, {"lora_B.bias": np.ones(96, "f")}, "is no part of plain LoRA"),
        ({}, {"lora_A.weight": np.ones((1, 64), "f")}, "has no lora_B"),
        ({}, {}, "it has no tensors"),
        (PAIRS, {"weight": np.ones((97, 64), "f")}, "has the shape (97, 64), but the weight of"),
    ],
)
def test_tensors_that_are_refused(base, tmp_path, pairs, more, problem):
    module = f"base_model.model.{Q_PROJ.removesuffix('.weight')}"
    more = {f"{module}.{end}": value for end, value in more.items()}
    adapter = write_peft(tmp_path, pairs, more=more, base_model_name_or_path="Qwen/Another")
    message = refusal(base, adapter, tmp_path)
    assert problem in message
    assert ("the weight of" not in message) or message.endswith("is for Qwen/Another.")


def test_what_is_no_adapter(base, tmp_path):
    assert "is a whole model, for --model" in refusal(base, base, base)
    assert "is no adapter" in refusal(base, tmp_path, tmp_path)
    adapter = write_peft(tmp_path / "a", PAIRS)
    assert f"no adapter_config.json, but {adapter} has; give" in refusal(base, tmp_path, tmp_path)
    assert "give the adapter's directory" in refusal(
        base, adapter / "adapter_model.safetensors", adapter
    )
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in refusal(base, adapter, adapter)
    (adapter / "adapter_model.bin").unlink()
    assert "it has no adapter_model.safetensors; get it" in refusal(base, adapter, adapter)
    (adapter / "adapters.safetensors").touch()
    assert "adapters.safetensors is MLX's" in refusal(base, adapter, adapter)
    model = write_gguf(tmp_path / "model.gguf", CONFIG, PARAMS).path
    assert "general.type is None, and an adapter has 'adapter'; give a whole" in refusal(
        base, model, model
    )
    missing = tmp_path / "missing"
    with pytest.raises(UserError, match="missing"):
        opening.open_model(base, missing)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"adapter__type": "control_vector"}, "adapter.type is 'control_vector'"),
        ({"architecture": "llama"}, "general.architecture is 'llama'"),
        ({"alpha": math.nan}, "adapter.lora.alpha is nan, not a number"),
    ],
)
def test_gguf_adapters_that_are_refused(base, tmp_path, changes, problem):
    lora = write_gguf_lora(tmp_path / "a.gguf", PAIRS, **changes)
    assert problem in refusal(base, lora, lora)


def test_gguf_adapter_of_another_model(base, tmp_path):
    name = Q_PROJ.replace("0", "9", 1)
    lora = write_gguf_lora(tmp_path / "a.gguf", {name: PAIRS[Q_PROJ]})
    assert "changes 'blk.9.attn_q.weight', which" in refusal(base, lora, lora)


def test_a_vocabulary_that_was_resized(base, tmp_path):
    more = {f"base_model.model.{EMBED}": np.zeros((50, 64), np.float32)}
    adapter = write_peft(tmp_path, PAIRS, more=more)
    assert "has (48, 64); the vocabulary was resized for it" in refusal(base, adapter, adapter)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.", "module.base_model.model._orig_mod."),
        lambda name: name.replace("model.layers", "layers"),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
    ids=["bare", "wrapped", "headless", "named"],
)
def test_other_names(tmp_path, rename):
    base = write_hf(tmp_path / "base", CONFIG, PARAMS)
    adapter = write_peft(tmp_path / "a", PAIRS)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({rename(k): v for k, v in tensors.items()}, adapter / "adapter_model.safetensors")
    assert_merged(base, adapter, [(PAIRS, lambda name: 2.0)])


def test_tying_that_was_trained_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, tied=True)
    params = {name: value for name, value in PARAMS.items() if name != HEAD}
    base = write_hf(tmp_path / "base", config, params).path
    adapter = write_peft(tmp_path / "a", {EMBED: ENDS[EMBED]}, ensure_weight_tying=True)
    assert "ensure_weight_tying is true" in refusal(base, adapter, adapter)
    write_peft(adapter, PAIRS, ensure_weight_tying=True)
    assert opening.open_model(base, adapter).config.tied


def test_config_is_read_once_and_strictly(base, tmp_path):
    adapter = write_peft(tmp_path, PAIRS)
    text = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(text[:-1] + ', "r": 9}')
    assert "'r' appears twice" in refusal(base, adapter, adapter)
    assert json.loads(text)["r"] == 4
