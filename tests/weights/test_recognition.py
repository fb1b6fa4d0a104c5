"""Well-formed checkpoints that are no plain Qwen2.5 model: each is told what it is."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Value
from safetensors.numpy import save_file

from qwen_jax.errors import UserError
from qwen_jax.weights.checkpoint import open_checkpoint
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf, write_hf
from tests.weights.gguf_bytes import Bytes, pair, string, tensor

CONFIG = tiny_config(num_layers=1)
PARAMS = random_parameters(CONFIG)
Q_PROJ = "model.layers.0.self_attn.q_proj"
BYTES = np.ones(8, np.uint8)
FLOATS = np.ones(8, np.float32)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message
    for unproven in ("damaged", "incomplete", "download it again", "missing"):
        assert unproven not in message
    return message


def save(directory: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """A directory with tensors beside the model's, of any type."""
    write_hf(directory, CONFIG, PARAMS, **config)
    kept = {k: v for k, v in PARAMS.items() if f"{k.removesuffix('.weight')}." not in str(tensors)}
    save_file({**kept, **tensors}, directory / "model.safetensors")
    return directory


TENSORS = {
    "PEFT, not merged": (
        {f"{Q_PROJ}.base_layer.weight": FLOATS, f"{Q_PROJ}.lora_A.default.weight": FLOATS},
        "of a PEFT adapter in its model; merge it with peft's merge_and_unload()",
    ),
    "PEFT in its own names": (
        {f"base_model.model.{Q_PROJ}.lora_B.weight": FLOATS},
        "of a PEFT adapter in its model",
    ),
    "bitsandbytes 4 bits": (
        {
            f"{Q_PROJ}.weight": BYTES,
            f"{Q_PROJ}.weight.absmax": BYTES,
            f"{Q_PROJ}.weight.quant_map": FLOATS,
            f"{Q_PROJ}.weight.quant_state.bitsandbytes__nf4": BYTES,
        },
        "a quantisation by bitsandbytes; choose the unquantised checkpoint",
    ),
    "bitsandbytes 8 bits": (
        {f"{Q_PROJ}.weight": BYTES.view(np.int8), f"{Q_PROJ}.SCB": FLOATS},
        "a quantisation by bitsandbytes",
    ),
    "MLX": (
        {
            f"{Q_PROJ}.weight": BYTES.view(np.uint32),
            f"{Q_PROJ}.scales": FLOATS,
            f"{Q_PROJ}.biases": FLOATS,
        },
        "a quantisation by MLX",
    ),
    "compressed-tensors": ({f"{Q_PROJ}.weight_packed": BYTES}, "by compressed-tensors"),
    "NVFP4": (
        {f"{Q_PROJ}.weight": BYTES, f"{Q_PROJ}.weight_scale_2": FLOATS},
        "by NVIDIA ModelOpt",
    ),
    "HQQ": ({f"{Q_PROJ}.W_q": BYTES}, "by HQQ"),
    "quanto": ({f"{Q_PROJ}.weight._data": BYTES}, "by quanto"),
    "reward": ({"score.weight": FLOATS}, "a head for rewards or classes, not for text"),
    "process reward": ({"score.0.weight": FLOATS}, "a head for rewards or classes"),
    "tokens": ({"classifier.weight": FLOATS}, "a head for rewards or classes"),
    "value": ({"v_head.summary.weight": FLOATS}, "a head for rewards or classes"),
    "images": ({"visual.blocks.0.norm1.weight": FLOATS}, "a model of images"),
    "sound": ({"audio_tower.conv1.weight": FLOATS}, "a model of images or sound"),
    "experts": ({"model.layers.0.mlp.experts.0.up_proj.weight": FLOATS}, "a mixture of experts"),
    "Qwen3": ({"model.layers.0.self_attn.q_norm.weight": FLOATS}, "of another family"),
}


@pytest.mark.parametrize("case", TENSORS, ids=lambda case: case.replace(" ", "_"))
def test_directories_by_their_tensors(tmp_path, case):
    tensors, told = TENSORS[case]
    message = refusal(save(tmp_path, tensors))
    assert told in message and any(repr(name) in message for name in tensors)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl', that is Qwen2-VL, which sees"),
        ({"model_type": "qwen2_moe"}, "'qwen2_moe', that is Qwen2-MoE, a mixture of experts"),
        ({"model_type": "qwen2_audio"}, "that is Qwen2-Audio, which hears; choose a Qwen2.5"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "which is MLX's; choose the unquant"),
        ({"quantization": "int8"}, "quantization is 'int8', which quantises weights, and only"),
    ],
)
def test_directories_by_their_config(tmp_path, changes, told):
    write_hf(tmp_path, CONFIG, PARAMS, **changes)
    assert told in refusal(tmp_path)


def test_models_for_embeddings(tmp_path, path):
    write_hf(tmp_path / "hf", CONFIG, PARAMS)
    (tmp_path / "hf" / "config_sentence_transformers.json").write_text("{}")
    assert "so that this is a model for embeddings; choose a model" in refusal(tmp_path / "hf")
    write_gguf(path, CONFIG, PARAMS, metadata={"qwen2.pooling_type": 3})
    assert "qwen2.pooling_type is 3, so that this is a model for embeddings" in refusal(path)
    write_gguf(path, CONFIG, PARAMS, metadata={"qwen2.pooling_type": 0})
    open_checkpoint(path)


@pytest.mark.parametrize("name", ["", "adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_is_told_to_be_one(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.x.lora_A.weight": FLOATS}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError) as caught:
        open_checkpoint(tmp_path / name)
    told = "the directory is a LoRA adapter of PEFT; give the model it was trained on, and this"
    assert str(caught.value) == f"{tmp_path}: {told} with --adapter."


@pytest.mark.parametrize("name", ["q.gguf.part1of2", "model.safetensors.part0", "m.gguf.aria2"])
@pytest.mark.parametrize("has_config", [True, False])
def test_directories_of_pieces(tmp_path, name, has_config):
    (tmp_path / name).write_bytes(b"\1\2\3\4")
    if has_config:
        (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path)
    assert f"{name}: the file is " in message and "as its name says" in message


def test_safetensors_without_their_config(tmp_path):
    write_hf(tmp_path, CONFIG, PARAMS)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing, which says what"):
        open_checkpoint(tmp_path)


def test_a_model_in_a_folder_below(tmp_path):
    (tmp_path / "Q4_K_M").mkdir()
    (tmp_path / "Q4_K_M" / "m.gguf").touch()
    assert f"has no model, but {tmp_path / 'Q4_K_M'} has; give that" in refusal(tmp_path)
    write_hf(tmp_path / "snapshots" / "abc", CONFIG, PARAMS)
    assert f"has no model, but {tmp_path / 'snapshots' / 'abc'} has" in refusal(tmp_path)
    write_hf(tmp_path / "checkpoint-500", CONFIG, PARAMS)
    assert "checkpoint-500 has; give that" in refusal(tmp_path)


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pytorch_model.bin", "PyTorch (pickle), which is not read; convert it where you trust it"),
        ("pytorch_model-00001-of-00002.bin", "PyTorch (pickle), which is not read; convert it"),
        ("consolidated.00.pth", "PyTorch (pickle), which is not read; choose"),
        ("model.onnx", "an ONNX model"),
        ("global_step500", "a checkpoint of DeepSpeed"),
        ("tf_model.h5", "TensorFlow"),
        ("weights.npz", "MLX"),
    ],
)
def test_directories_of_other_formats(tmp_path, name, told, has_config):
    (tmp_path / name).touch()
    if has_config:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    message = refusal(tmp_path)
    assert f"{name} is " in message and told in message
    if "convert" in told:
        assert f"M.from_pretrained('{tmp_path}').save_pretrained(" in message


# GGUF


def gguf_of(path: Path, pairs: dict[str, str], *tensors: str) -> Path:
    entries = tuple(tensor(name, offset=32 * i) for i, name in enumerate(tensors))
    keys = tuple(pair(key, Value.STRING, string(text)) for key, text in pairs.items())
    return Bytes(keys, entries, bytes(32 * len(tensors))).write(path)


GGUF_FILES = {
    "LoRA": (
        {"general.architecture": "qwen2", "general.type": "adapter", "adapter.type": "lora"},
        ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"),
        "is a LoRA adapter; give the model it was trained on, and this with --adapter",
    ),
    "LoRA without a type": (
        {"general.architecture": "qwen2"},
        ("blk.0.attn_q.weight.lora_a",),
        "'blk.0.attn_q.weight.lora_a' is of a LoRA adapter",
    ),
    "mmproj": (
        {"general.architecture": "clip", "general.type": "mmproj"},
        ("v.blk.0.attn_q.weight",),
        "is an encoder of images or sound (mmproj)",
    ),
    "clip": (
        {"general.architecture": "clip"},
        ("v.blk.0.attn_q.weight",),
        "'clip', that is an encoder of images (mmproj)",
    ),
    "imatrix": (
        {"general.type": "imatrix"},
        ("blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"),
        "is an importance matrix",
    ),
    "control vector": (
        {"general.architecture": "controlvector"},
        ("direction.1",),
        "is a control vector",
    ),
    "ranks": (
        {"general.architecture": "qwen2"},
        ("token_embd.weight", "cls.output.weight"),
        "'cls.output.weight' is of a model with a head for ranks or classes",
    ),
    "experts": (
        {"general.architecture": "qwen2moe"},
        ("blk.0.ffn_gate_exps.weight",),
        "'qwen2moe', that is Qwen2-MoE",
    ),
    "images": ({"general.architecture": "qwen2vl"}, ("token_embd.weight",), "'qwen2vl', that is"),
    "vocabulary": ({"general.architecture": "qwen2"}, (), "a vocabulary and no weights"),
}


@pytest.mark.parametrize("case", GGUF_FILES, ids=lambda case: case.replace(" ", "_"))
def test_gguf_files(path, case):
    pairs, tensors, told = GGUF_FILES[case]
    assert told in refusal(gguf_of(path, pairs, *tensors))


def test_types_are_those_of_gguf():
    types = {gguf.GGUFType.ADAPTER, gguf.GGUFType.IMATRIX, gguf.GGUFType.MMPROJ}
    assert types == {"adapter", "imatrix", "mmproj"}


def test_a_model_says_that_it_is_one(path):
    write_gguf(path, CONFIG, PARAMS, metadata={"general.type": "model"})
    assert open_checkpoint(path).config.num_layers == 1
