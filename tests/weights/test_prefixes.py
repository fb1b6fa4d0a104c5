"""Names that wrappers lengthen: they load, and messages say the names of the file."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen_jax.errors import UserError
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests.quantised_checkpoints import awq, fp8, gptq, write_quantised
from tests.tiny_checkpoints import canonical, random_parameters, tiny_config, write_hf

SIZES = {"hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "ffn_size": 8}
TIED = tiny_config(**SIZES, vocab_size=8)
UNTIED = tiny_config(**SIZES, vocab_size=8, tied=False)


def prefixed(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def inner(prefix: str) -> Callable[[str], str]:
    """A prefix instead of `model.`; the head stays outside."""
    return lambda name: re.sub(r"^model\.", prefix, name)


NAMES = {
    "Qwen2Model within": inner(""),
    "DataParallel": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "both, the other way": prefixed("_orig_mod.module."),
    "PEFT": prefixed("base_model.model."),
    "PEFT in DataParallel": prefixed("module.base_model.model."),
    "compiled within": inner("model._orig_mod."),
    "compiled layer by layer": lambda name: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", name),
    "checkpointed layers": lambda name: re.sub(
        r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module.", name
    ),
    "FSDP": lambda name: (
        "_fsdp_wrapped_module." + name.replace("self_attn.", "self_attn._fsdp_wrapped_module.")
    ),
    "language model": prefixed("language_model."),
    "language model within": inner("model.language_model."),
    "another trainer's": prefixed("policy.actor."),
}


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("case", NAMES, ids=lambda case: re.sub(r"\W+", "_", case))
def test_prefixes_load(tmp_path, case, config):
    params = random_parameters(config)
    write_hf(tmp_path, config, {NAMES[case](name): value for name, value in params.items()})
    loaded = load_parameters(open_checkpoint(tmp_path), "float32")
    expected = canonical(params)
    assert loaded.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), values)


QUANTISED = {
    "gptq": (gptq(), {"bits": 4, "group_size": 32}),
    "awq": (awq(), {"bits": 4, "group_size": 32}),
    "fp8": (fp8(), {"weight_block_size": [128, 128]}),
}


@pytest.mark.parametrize("method", QUANTISED)
def test_prefixes_of_quantised_weights(tmp_path, method):
    config = tiny_config(num_layers=1, hidden_size=32, head_dim=16, ffn_size=32, vocab_size=8)
    quantise, settings = QUANTISED[method]
    settings = settings | {"quant_method": method}
    written = write_quantised(tmp_path, config, random_parameters(config), quantise, settings)
    wrapped = {f"module.{k}": np.ascontiguousarray(v) for k, v in written.tensors.items()}
    save_file(wrapped, tmp_path / "model.safetensors")
    loaded = load_parameters(open_checkpoint(tmp_path), "float32")
    for name, values in canonical(written.parameters).items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), values)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message
    return message


PARAMS = random_parameters(TIED)
PREFIX = "module.base_model.model."
WITHIN = {PREFIX + name: value for name, value in PARAMS.items()}


def test_missing_and_unknown_tensors_have_the_names_of_the_file(tmp_path):
    bias = PREFIX + "model.layers.1.self_attn.k_proj.bias"
    write_hf(tmp_path, TIED, {k: v for k, v in WITHIN.items() if k != bias})
    # Wrappers, which may stand anywhere, are left out.
    assert f"'{bias.removeprefix('module.')}' is missing" in refusal(tmp_path)
    scale = PREFIX + "model.layers.1.self_attn.k_proj.scale"
    write_hf(tmp_path, TIED, WITHIN | {scale: PARAMS["model.norm.weight"]})
    assert f"{scale!r} is no part of a Qwen2.5 model" in refusal(tmp_path)


def test_a_wrong_shape_has_the_name_of_the_file(tmp_path):
    norm = PREFIX + "model.norm.weight"
    write_hf(tmp_path, TIED, WITHIN | {norm: np.ones(9, np.float32)})
    assert f"the tensor {norm!r} has the shape (9,)" in refusal(tmp_path)


def test_names_that_would_be_one_are_refused(tmp_path):
    norm = "model.norm.weight"
    write_hf(tmp_path, TIED, PARAMS | {"_orig_mod." + norm: PARAMS[norm]})
    message = refusal(tmp_path)
    assert f"'_orig_mod.{norm}'" in message and f"are both {norm!r} once" in message


def test_a_mix_of_prefixes_names_both(tmp_path):
    mixed = {k: v for k, v in PARAMS.items() if "layers.1." not in k}
    mixed |= {PREFIX + k: v for k, v in PARAMS.items() if "layers.1." in k}
    write_hf(tmp_path, TIED, mixed)
    message = refusal(tmp_path)
    assert "'model.layers.1.self_attn.q_proj.weight'" in message
    assert f"'{PREFIX}model.layers.1.input_layernorm.weight'" in message


@pytest.mark.parametrize("naming", [prefixed(""), inner("")])
def test_a_model_without_its_head(tmp_path, naming):
    names = {naming(name): value for name, value in PARAMS.items()}
    write_hf(tmp_path, TIED, names, tie_word_embeddings=False)
    message = refusal(tmp_path)
    assert "lm_head.weight is missing, and tie_word_embeddings is false" in message
    assert "architectures is ['Qwen2ForCausalLM']" in message
