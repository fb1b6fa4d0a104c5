"""GPTQ, AWQ and FP8 directories: every value against its formula in float64, rounded once."""

import dataclasses
import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from absl import logging
from safetensors.numpy import save_file

from qwen_jax.errors import UserError
from qwen_jax.tasks import inspect
from qwen_jax.weights import blocks
from qwen_jax.weights.integers import Awq, Gptq, unpack
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from qwen_jax.weights.open_files import OpenFiles
from qwen_jax.weights.safetensors import read_safetensors
from qwen_jax.weights.tensors import TensorFiles
from tests.quantised_checkpoints import (
    Quantise,
    Quantised,
    awq,
    fp8,
    gptq,
    write_quantised,
)
from tests.tiny_checkpoints import canonical, hf_config, random_parameters, tiny_config

# 160 and 192 are no multiples of 128, but of 32.
CONFIG = tiny_config(num_layers=1, hidden_size=160, ffn_size=192, head_dim=16, vocab_size=64)
PARAMS = random_parameters(CONFIG)
Q_PROJ = "model.layers.0.self_attn.q_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True},
        }
    },
    "ignore": ["lm_head"],
}
V2 = {"checkpoint_format": "gptq_v2"}

CASES: dict[str, tuple[dict[str, Any], Quantise]] = {
    "gptq": (GPTQ, gptq()),
    "gptq-no-g_idx": (GPTQ, gptq(g_idx=False)),
    "gptq-act-order": (GPTQ | {"desc_act": True}, gptq(act_order=True)),
    "gptq-one-group": (GPTQ | {"group_size": -1}, gptq(group_size=-1)),
    "gptq-huge-group": (GPTQ | {"group_size": 10**30}, gptq(group_size=-1)),
    "gptq-cut-group": (GPTQ | {"group_size": 128}, gptq(group_size=128)),
    "gptq-v1": (GPTQ | {"checkpoint_format": "gptq"}, gptq()),
    "gptq-v2": (GPTQ | V2, gptq(less_one=False)),
    "gptq-v2-as-format": (
        GPTQ | {"checkpoint_format": None, "format": "gptq_v2"},
        gptq(less_one=False),
    ),
    "gptq-int8": (GPTQ | {"bits": 8}, gptq(bits=8)),
    "gptq-int8-act-order": (GPTQ | {"bits": 8} | V2, gptq(8, less_one=False, act_order=True)),
    "gptq-int3": (GPTQ | {"bits": 3}, gptq(bits=3)),
    "gptq-int2": (GPTQ | {"bits": 2, "group_size": 64}, gptq(bits=2, group_size=64)),
    "gptq-bfloat16": (GPTQ, gptq(scales="BF16")),
    "gptq-float32": (GPTQ, gptq(scales="F32")),
    "awq": (AWQ, awq()),
    "awq-one-group": (AWQ | {"group_size": -1, "version": "GEMM"}, awq(group_size=-1)),
    "awq-cut-group": (AWQ | {"group_size": 128}, awq(group_size=128)),
    "awq-int8": (AWQ | {"bits": 8}, awq(bits=8)),
    "awq-bfloat16": (AWQ, awq(scales="BF16")),
    "fp8": (FP8, fp8()),
    "fp8-small-blocks": (FP8 | {"weight_block_size": [48, 32]}, fp8(block=(48, 32))),
    "fp8-huge-blocks": (FP8 | {"weight_block_size": [10**30] * 2}, fp8(block=(10**30,) * 2)),
    "fp8-bfloat16": (FP8, fp8(scales=ml_dtypes.bfloat16)),
    "fp8-powers-of-two": (FP8, fp8(scales=ml_dtypes.float8_e8m0fnu)),
    "fp8-silent": ({"quant_method": "fp8"}, fp8()),
    "fp8-silent-row": ({"quant_method": "fp8"}, fp8("row", name="weight_scale")),
    "fp8-matrix": (FP8 | {"weight_block_size": None}, fp8("scalar", name="weight_scale")),
    "fp8-vector": ({"quant_method": "fp8", "weight_block_size": None}, fp8("matrix")),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, fp8("row", name="weight_scale")),
    "compressed-tensors": (CHANNELS, fp8("row", name="weight_scale")),
}


def assert_loads(written: Quantised, dtype: str = "float32") -> None:
    loaded = load_parameters(open_checkpoint(written.path), dtype)
    expected = canonical(written.parameters)
    assert loaded.keys() == expected.keys()
    for name, values in expected.items():
        found = np.asarray(loaded[name])
        np.testing.assert_array_equal(found, values.astype(found.dtype), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_values(tmp_path, case):
    settings, quantise = CASES[case]
    assert_loads(write_quantised(tmp_path, CONFIG, PARAMS, quantise, settings))


@pytest.mark.parametrize("case", ["gptq-act-order", "awq", "fp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_in_other_dtypes(tmp_path, case, dtype):
    settings, quantise = CASES[case]
    written = write_quantised(tmp_path, CONFIG, PARAMS, quantise, settings)
    loaded = load_parameters(open_checkpoint(written.path), dtype)
    for name, values in canonical(written.parameters).items():
        found = np.asarray(loaded[name])
        np.testing.assert_array_equal(found, values.astype(found.dtype), err_msg=name)


@pytest.mark.parametrize("case", ["gptq-act-order", "gptq-int3", "awq", "awq-int8", "fp8"])
def test_rows_in_pieces_of_any_size(tmp_path, case):
    settings, quantise = CASES[case]
    written = write_quantised(tmp_path, CONFIG, PARAMS, quantise, settings)
    weight = open_checkpoint(tmp_path).stored[f"{Q_PROJ}.weight"]
    whole = written.parameters[f"{Q_PROJ}.weight"]
    for start, stop in ((0, 1), (5, 6), (3, 21), (31, 33), (40, 96)):
        np.testing.assert_array_equal(weight.rows(start, stop), whole[start:stop])


def test_values_in_chunks_on_all_cores(tmp_path, monkeypatch):
    settings, quantise = CASES["gptq-act-order"]
    written = write_quantised(tmp_path, CONFIG, PARAMS, quantise, settings)
    monkeypatch.setattr(blocks, "CHUNK", 7 * 160)
    assert_loads(written)


def test_words_by_hand():
    """AWQ's order, and 3 bits that lie across two words, as their packers write them."""
    word = np.array([[0x75316420]], np.uint32)
    np.testing.assert_array_equal(unpack(word, 4), [[0, 2, 4, 6, 1, 3, 5, 7]])
    files: Any = dataclasses.make_dataclass("Files", [])()
    weight = Awq(files, "x", (8, 1), 4, -1)
    object.__setattr__(weight, "words", lambda part: word)
    np.testing.assert_array_equal(weight.unpacked("qweight", 0, 8)[:, 0], range(8))
    # The eleventh number, 6, has its low bits 10 atop the first word and its high bit in the next.
    words = np.array([[0b10 << 30, 0b1, 0]], np.uint32)
    assert unpack(words, 3)[0, 10] == 6 and unpack(words, 3).sum() == 6


@pytest.mark.parametrize("case", ["gptq", "awq", "fp8"])
def test_modules_left_out(tmp_path, case):
    settings, quantise = CASES[case]
    untied = dataclasses.replace(CONFIG, tied=False)
    params = random_parameters(untied)
    extra = {"modules_to_not_convert": ["mlp"], "lm_head": True}
    written = write_quantised(
        tmp_path, untied, params, quantise, settings | extra, plain=("embed", "mlp"), dtype="BF16"
    )
    assert_loads(written)
    kind = {"gptq": "GPTQ-Int4", "awq": "AWQ-Int4", "fp8": "F8_E4M3"}[case]
    assert open_checkpoint(tmp_path).quantization == {"BF16": 10, kind: 5}


def test_dynamic_settings_of_modules(tmp_path):
    """GPTQModel's patterns: some modules in other bits, some not at all."""
    rng, dynamic = np.random.default_rng(1), {r"+:.*\.mlp\..*": {"bits": 8, "group_size": 64}}
    settings = GPTQ | {"dynamic": {r"-:.*\.o_proj": {}, **dynamic}}
    written = write_quantised(tmp_path, CONFIG, PARAMS, gptq(), settings, plain=("embed", "o_proj"))
    for name, value in PARAMS.items():
        if ".mlp." in name:
            parts, values = gptq(8, 64)(rng, value.shape)
            module = name.removesuffix(".weight")
            written.tensors.update({f"{module}.{k}": v for k, v in parts.items()})
            written.parameters[name] = values.astype(np.float32)
    written.save()
    assert_loads(written)


@pytest.mark.parametrize(
    ("file", "settings", "case"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, "awq"),
    ],
)
def test_older_files_beside(tmp_path, file, settings, case):
    written = write_quantised(tmp_path, CONFIG, PARAMS, CASES[case][1], None)
    assert "'model.layers.0.mlp.down_proj.qweight' is of a quantised weight" in refusal(tmp_path)
    (tmp_path / file).write_text(json.dumps(settings), encoding="utf-8")
    assert_loads(written)


def test_scales_without_a_config(tmp_path):
    write_quantised(tmp_path, CONFIG, PARAMS, fp8(), None)
    assert "weight_scale_inv' is of a quantised weight, but config.json has no" in refusal(tmp_path)


def test_the_config_under_its_other_name(tmp_path):
    settings, quantise = CASES["compressed-tensors"]
    written = write_quantised(tmp_path, CONFIG, PARAMS, quantise, None)
    config = hf_config(CONFIG, compression_config=settings)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_loads(written)
    config["compression_config"] = settings | {"format": "sparse-bitmask"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "config.json, compression_config: format is 'sparse-bitmask'" in refusal(tmp_path)


def test_biases_of_zeros_are_ignored(tmp_path):
    """Qwen's own GPTQ checkpoints have them in modules that have no bias."""
    written = write_quantised(tmp_path, CONFIG, PARAMS, gptq(), GPTQ)
    bias = "model.layers.0.mlp.up_proj.bias"
    written.save(**{bias: np.zeros(192, np.float16)})
    assert open_checkpoint(tmp_path).ignored == (bias,)
    assert_loads(written)
    written.save(**{bias: np.eye(192, dtype=np.float16)[3]})
    assert f"{bias!r} is no part of a Qwen2.5 model" in refusal(tmp_path)


def test_activations_are_said_not_to_be_quantised(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    settings = FP8 | {"activation_scheme": "static"}
    written = write_quantised(tmp_path, CONFIG, PARAMS, fp8(), settings)
    scale = f"{Q_PROJ}.input_scale"
    written.save(**{scale: np.float32([0.1])})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.ignored == (scale,)
    open_checkpoint(tmp_path)
    assert len(said) == 1 and "activations are not quantised here" in said[0]


def test_inspect_says_how_weights_are_stored(tmp_path):
    write_quantised(tmp_path, CONFIG, PARAMS, gptq(), GPTQ)
    checkpoint = open_checkpoint(tmp_path)
    assert list(inspect.file_lines(checkpoint))[2] == "7 F16, 7 GPTQ-Int4"
    lines = list(inspect.tensor_lines(checkpoint))
    assert lines[-1].startswith("model.norm.weight ") and len(lines) == len(checkpoint.tensors)
    assert any("q_proj.qweight" in line and "20 x 96" in line for line in lines)
    assert len({len(line) for line in lines}) == 1  # a table


def test_not_a_number(tmp_path):
    written = write_quantised(tmp_path, CONFIG, PARAMS, fp8(), FP8)
    values = written.tensors[f"{Q_PROJ}.weight"].copy()
    values[3, 4] = np.nan
    written.save(**{f"{Q_PROJ}.weight": values})
    with pytest.raises(UserError, match=r"q_proj\.weight' has values that are not finite"):
        load_parameters(open_checkpoint(tmp_path), "float32")


def test_float8_without_scales_is_what_it_says(tmp_path):
    params = {k: v.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) for k, v in PARAMS.items()}
    written = write_quantised(tmp_path, CONFIG, params, fp8(), None, plain=("model",), dtype="F32")
    cast = {k: v.astype(ml_dtypes.float8_e4m3fn) for k, v in written.tensors.items() if v.ndim > 1}
    written.save(**cast)
    assert_loads(written)
    (tmp_path / "config.json").write_text(
        json.dumps(
            json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": FP8}
        )
    )
    assert "k_proj.weight_scale_inv' and 5 more are missing" in refusal(tmp_path)


@pytest.mark.parametrize("case", ["gptq", "awq", "fp8"])
def test_names_with_other_prefixes(tmp_path, case):
    settings, quantise = CASES[case]
    written = write_quantised(tmp_path, CONFIG, PARAMS, quantise, settings)
    renamed = {f"module.{name}": value for name, value in written.tensors.items()}
    dataclasses.replace(written, tensors=renamed).save()
    assert_loads(written)


def test_a_matrix_is_expanded_in_pieces(tmp_path):
    """No copy of a matrix is made: what is in memory besides the result is some pieces of it."""
    size = 4096
    rng = np.random.default_rng(0)
    tensors = {
        "x.qweight": rng.integers(0, 2**31, (size // 8, size), np.int32),
        "x.qzeros": rng.integers(0, 2**31, (size // 128, size // 8), np.int32),
        "x.scales": np.ones((size // 128, size), np.float16),
        "x.g_idx": rng.permutation(np.arange(size, dtype=np.int32) // 128),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    files = TensorFiles(
        (tmp_path / "x.safetensors",), {}, read_safetensors(tmp_path / "x.safetensors", OpenFiles())
    )
    weight = Gptq(files, "x", (size, size), 4, 128, zeros_less_one=True, ordered=True)
    out = np.empty(weight.shape, ml_dtypes.bfloat16)
    tracemalloc.start()
    blocks.fill(out, weight.rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < out.nbytes / 2


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', and only gptq, awq"),
        ({"quant_method": None}, "quant_method is None, and it must be text"),
        ({}, "quant_method is missing"),
        ([4], "quantization_config is [4], but it must be a mapping"),
        (GPTQ | {"bits": 5}, "bits is 5, and only 2, 3, 4, 8 are read"),
        (GPTQ | {"bits": True}, "bits is True, and it must be a whole number"),
        (GPTQ | {"bits": None}, "bits is None, and it must be"),
        (GPTQ | {"group_size": 0}, "group_size is 0, and it must be positive, or -1"),
        (GPTQ | {"desc_act": "yes"}, "desc_act is 'yes', and it must be true or false"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', and only gptq"),
        (GPTQ | V2 | {"format": "gptq"}, "format is 'gptq', and checkpoint_format is another"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format is True"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype is 'int16', and only int32"),
        (GPTQ | {"dynamic": {"+:(": {}}}, "is no pattern"),
        (GPTQ | {"bits": 8}, "has the shape (20, 96), but bits 8 and group_size 32"),
        (GPTQ | {"group_size": 64}, "qzeros' has the shape (5, 12), but bits 4 and group_size 64"),
        (AWQ, "qweight' has the shape (20, 96), but bits 4"),
        (AWQ | {"version": "gemv"}, "version is 'gemv', and only gemm is read; choose a GPTQ"),
        (AWQ | {"version": "marlin"}, "version is 'marlin', and only gemm"),
        (AWQ | {"format": "gemv_fast"}, "format is 'gemv_fast', and only gemm"),
        (AWQ | {"backend": "llm-awq"}, "backend is 'llm-awq', and only AutoAWQ's"),
        (GPTQ | {"rotation": "hadamard"}, "rotation is 'hadamard', and only weights"),
        (CHANNELS | {"transform_config": {"a": 1}}, "transform_config is {'a': 1}, and act"),
        (AWQ | {"bits": 3}, "bits is 3, and only 4, 8 are read"),
        (AWQ | {"bits": 8}, "qweight' has the shape (20, 96), but bits 8 and group_size 32"),
        (FP8, "of the 14 tensors of this model, 'model.layers.0.self_attn.q_proj.weight'"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size is [128], and it must be two"),
        (CHANNELS | {"format": "pack-quantized"}, "format is 'pack-quantized', and only float-"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, problem):
    write_quantised(tmp_path, CONFIG, PARAMS, gptq(), GPTQ)
    text = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(text), encoding="utf-8")
    assert problem in refusal(tmp_path)


def test_tensors_that_are_refused(tmp_path):
    written = write_quantised(tmp_path, CONFIG, PARAMS, gptq(), GPTQ)

    def changed(part: str, value: np.ndarray | None) -> str:
        written.save(**{f"{Q_PROJ}.{part}": value})
        return refusal(tmp_path)

    order = written.tensors[f"{Q_PROJ}.g_idx"]
    assert "q_proj.scales' is missing" in changed("scales", None)
    assert "q_proj.qzeros' is missing" in changed("qzeros", None)
    assert "has groups from 0 to 5, but there are 5" in changed("g_idx", order + (order == 4))
    assert "has groups from -1 to 4" in changed("g_idx", order - (order == 0))
    assert "g_idx' has the shape (159,)" in changed("g_idx", order[1:])
    assert "g_idx' is of type I64" in changed("g_idx", order.astype(np.int64))
    scales = written.tensors[f"{Q_PROJ}.scales"]
    assert "scales' is of type F64, but it must be F16" in changed("scales", scales.astype("f8"))
    settings = GPTQ | {"desc_act": True}
    written = write_quantised(tmp_path, CONFIG, PARAMS, gptq(g_idx=False), settings)
    assert "v_proj.g_idx' and 4 more are missing" in refusal(tmp_path)


def test_float8_scales_that_are_refused(tmp_path):
    written = write_quantised(tmp_path, CONFIG, PARAMS, fp8(), FP8)
    name = f"{Q_PROJ}.weight_scale_inv"

    def changed(value: np.ndarray | None) -> str:
        written.save(**{name: value})
        return refusal(tmp_path)

    assert f"{name!r} is missing" in changed(None)
    assert "has the shape (1,), but it must be (1, 2), one for each block of 128 x 128" in changed(
        np.float32([1])
    )
    assert "is of type F64" in changed(np.ones((1, 2)))
    write_quantised(tmp_path, CONFIG, PARAMS, fp8(), FP8 | {"weight_block_size": None})
    assert "it must be (1,) or (96, 1), as quantization_config has no blocks" in refusal(tmp_path)
