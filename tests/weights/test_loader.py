"""From files to parameters: values against gguf.quants, and every contradiction refused."""

import dataclasses
import os
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen_jax.accuracy.weights.audit import audit_weights
from qwen_jax.errors import UserError
from qwen_jax.loading import read_tokenizer
from qwen_jax.weights import blocks, names
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests.tiny_checkpoints import (
    Written,
    canonical,
    random_parameters,
    tiny_config,
    write_gguf,
    write_hf,
)

CONFIG = tiny_config()
PARAMS = random_parameters(CONFIG)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NUMPY_TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def refusal(path: Path, dtype: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint = open_checkpoint(path)
        if dtype:
            load_parameters(checkpoint, dtype)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message
    return message


def assert_loads(written: Written, dtype: str) -> None:
    expected = canonical(written.parameters)
    loaded = load_parameters(open_checkpoint(written.path), dtype)
    assert loaded.keys() == expected.keys()
    for name, values in expected.items():
        kept = np.float32 if name.endswith("norm") else NUMPY_TYPES[dtype]
        assert isinstance(loaded[name], jax.Array)
        assert loaded[name].dtype == kept
        np.testing.assert_array_equal(np.asarray(loaded[name]), values.astype(kept))


@pytest.mark.parametrize("kind", sorted({kind.name for kind in blocks.DECODABLE} - {"F64"}))
def test_every_type_loads(path, kind):
    assert_loads(write_gguf(path, CONFIG, PARAMS, types=kind), "float32")


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_dtype_and_format(tmp_path, dtype, tied):
    config = tiny_config(tied=tied, num_layers=1)
    params = random_parameters(config)
    types = {Q_PROJ: "Q4_K", "model.embed_tokens.weight": "Q6_K", "lm_head.weight": "F16"}
    assert_loads(write_gguf(tmp_path / "a.gguf", config, params, types=types), dtype)
    assert_loads(write_gguf(tmp_path / "b.gguf", config, params, split_max_tensors=4), dtype)
    assert_loads(write_hf(tmp_path / "c", config, params, dtype="bfloat16", shards=2), dtype)
    assert_loads(write_hf(tmp_path / "d", config, params), dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_config_is_the_one_written(tmp_path, tied):
    config = tiny_config(tied=tied)
    params = random_parameters(config)
    gguf_file = open_checkpoint(write_gguf(tmp_path / "a.gguf", config, params).path)
    # GGUF keeps the epsilon in float32.
    rounded = dataclasses.replace(config, rms_eps=float(np.float32(config.rms_eps)))
    assert gguf_file.config == rounded
    assert gguf_file.format == "gguf"
    directory = open_checkpoint(write_hf(tmp_path / "hf", config, params).path)
    assert directory.config == config
    assert directory.format == "safetensors"


def test_quantization_counts_types(path):
    written = write_gguf(path, CONFIG, PARAMS, types={Q_PROJ: "Q4_K"})
    assert open_checkpoint(written.path).quantization == {"F32": 25, "Q4_K": 1}


def test_names_and_shapes_are_the_contract():
    found = {p.name: p.shape for p in names.parameters(tiny_config(tied=False), "gguf")}
    expected = canonical(random_parameters(tiny_config(tied=False)))
    assert found == {name: value.shape for name, value in expected.items()}


def test_progress_counts_every_byte_once(path):
    checkpoint = open_checkpoint(write_gguf(path, CONFIG, PARAMS, types="Q8_0").path)
    heard = []
    load_parameters(checkpoint, "float32", progress=lambda done, total: heard.append((done, total)))
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    assert len(heard) == len(checkpoint.tensors)
    assert heard[-1] == (total, total)
    assert [done for done, _ in heard] == sorted({done for done, _ in heard})


def test_device_is_obeyed(path):
    checkpoint = open_checkpoint(write_gguf(path, CONFIG, PARAMS).path)
    (device,) = jax.devices("cpu")[:1]
    sharding = jax.sharding.SingleDeviceSharding(device)
    for place in (device, sharding):
        loaded = load_parameters(checkpoint, jnp.bfloat16, device=place)
        assert loaded["embed"].devices() == {device}


def test_other_dtypes_are_refused(path):
    checkpoint = open_checkpoint(write_gguf(path, CONFIG, PARAMS).path)
    with pytest.raises(UserError, match="dtype is 'int8'; choose one of float32, bfloat16"):
        load_parameters(checkpoint, "int8")


# Directories


def test_directory_with_one_gguf(tmp_path):
    write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS, split_max_tensors=9)
    assert open_checkpoint(tmp_path).files.paths[0].name == "m-00001-of-00003.gguf"
    (tmp_path / "x.gguf").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert open_checkpoint(tmp_path).format == "gguf"
    (tmp_path / "config.json").unlink()
    write_gguf(tmp_path / "n.gguf", CONFIG, PARAMS)
    assert "holds the GGUF files m-00001-of-00003.gguf, n.gguf" in refusal(tmp_path)


def test_directory_with_nothing(tmp_path):
    assert "has no safetensors with a config.json and holds no model" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "x.gguf", "x.json"])
def test_a_directory_of_any_name(tmp_path, name):
    assert_loads(write_hf(tmp_path / name, CONFIG, PARAMS), "float32")
    other = tmp_path / f"other-{name}"
    other.mkdir()
    write_gguf(other / "m.gguf", CONFIG, PARAMS)
    assert open_checkpoint(other).format == "gguf"


def test_a_file_of_a_directory_stands_for_it(tmp_path):
    write_hf(tmp_path, CONFIG, PARAMS, shards=2)
    for name in ("config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"):
        checkpoint = open_checkpoint(tmp_path / name)
        assert (checkpoint.path, len(checkpoint.files.paths)) == (tmp_path, 2)
    other = tmp_path / "consolidated.safetensors"
    other.write_bytes((tmp_path / "model-00001-of-00002.safetensors").read_bytes())
    assert "the model in this directory is model-00001-of-00002.safetensors" in refusal(other)


def test_gguf_files_are_known_by_their_content(tmp_path):
    written = write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS)
    renamed = tmp_path / "model.safetensors"
    written.path.rename(renamed)
    (tmp_path / "config.json").touch()
    assert open_checkpoint(renamed).format == "gguf"


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    assert "it is a pipe, and no file" in refusal(tmp_path / "m.gguf")


# Contradictions


def without(*removed: str) -> dict[str, np.ndarray]:
    return {name: value for name, value in PARAMS.items() if name not in removed}


def test_missing_tensor(path):
    write_gguf(path, CONFIG, without("model.layers.1.self_attn.k_proj.bias"))
    assert "'blk.1.attn_k.bias' is missing" in refusal(path)


def test_missing_embedding(path):
    write_gguf(path, CONFIG, without("model.embed_tokens.weight"))
    assert "'token_embd.weight' is missing" in refusal(path)


def test_many_missing_tensors_are_counted(path):
    write_gguf(path, CONFIG, {k: v for k, v in PARAMS.items() if "layers.1." not in k})
    assert "'blk.1.attn_norm.weight', 'blk.1.attn_q.weight'" in refusal(path)
    assert "and 9 more are missing" in refusal(path)


def test_head_beside_a_tied_config(tmp_path):
    same = PARAMS | {"lm_head.weight": PARAMS["model.embed_tokens.weight"].copy()}
    written = write_hf(tmp_path, CONFIG, same)
    checkpoint = open_checkpoint(written.path)
    assert checkpoint.ignored == ("lm_head.weight",)
    assert "lm_head" not in load_parameters(checkpoint, "float32")
    same["lm_head.weight"][-1, -1] += 1
    write_hf(tmp_path, CONFIG, same)
    with pytest.raises(UserError, match=r"is true, but lm_head\.weight differs from"):
        open_checkpoint(tmp_path)


def test_tokens_that_are_no_list(tmp_path):
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}
    metadata |= {"tokenizer.ggml.tokens": 5, "tokenizer.ggml.token_type": [1]}
    path = write_gguf(tmp_path / "a.gguf", CONFIG, PARAMS, metadata=metadata).path
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.tokens"):
        read_tokenizer(open_checkpoint(path))


def test_an_embedding_that_is_saved_as_the_head(tmp_path):
    """safetensors' save_model keeps one name of a shared tensor, and transformers loads it."""
    params = dict(PARAMS)
    params["lm_head.weight"] = params.pop("model.embed_tokens.weight")
    loaded = load_parameters(open_checkpoint(write_hf(tmp_path, CONFIG, params).path), "float32")
    assert loaded.keys() == canonical(PARAMS).keys()
    np.testing.assert_array_equal(loaded["embed"], params["lm_head.weight"])
    write_hf(tmp_path, tiny_config(tied=False), params)
    with pytest.raises(UserError, match=r"'model\.embed_tokens\.weight' is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
def test_float64_is_rounded_once(tmp_path, dtype):
    rng = np.random.default_rng(0)
    params = {name: value + rng.normal(0, 1e-9, value.shape) for name, value in PARAMS.items()}
    checkpoint = open_checkpoint(write_hf(tmp_path, CONFIG, params, dtype="float64").path)
    loaded = load_parameters(checkpoint, dtype)
    for name, values in canonical(params).items():
        np.testing.assert_array_equal(loaded[name], values.astype(loaded[name].dtype))


def rewritten(path: Path, changes: dict[str, np.ndarray | None]) -> Path:
    """PARAMS as a GGUF file with GGUF tensors added or replaced; None drops one."""
    source = path.with_name("source.gguf")
    write_gguf(source, CONFIG, PARAMS)
    reader = gguf.GGUFReader(source)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors} | changes
    writer = gguf.GGUFWriter(path, "qwen2")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for name, values in tensors.items():
        if values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_float64_in_gguf(path):
    """GGML's, and the one type that gguf does not decode."""
    values = np.random.default_rng(0).normal(0, 0.1, (512, 256))
    checkpoint = open_checkpoint(rewritten(path, {"blk.1.ffn_up.weight": values}))
    loaded = load_parameters(checkpoint, "float32")
    np.testing.assert_array_equal(loaded["layers.1.gate_up_proj.weight"][512:], np.float32(values))
    assert {finding.verdict for finding in audit_weights(checkpoint, loaded)} == {"exact"}


def test_unknown_tensor(path):
    rewritten(path, {"blk.0.attn_q.scale": np.ones(1, np.float32)})
    assert "'blk.0.attn_q.scale' is no part of a Qwen2.5 model" in refusal(path)


def test_harmless_tensor_is_ignored_and_listed(path):
    rewritten(path, {"rope_freqs.weight": np.ones(16, np.float32)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.ignored == ("rope_freqs.weight",)
    assert load_parameters(checkpoint, "float32").keys() == canonical(PARAMS).keys()


def test_transposed_tensor(path):
    rewritten(path, {"blk.0.ffn_up.weight": np.zeros((256, 512), np.float32)})
    message = refusal(path)
    assert "'blk.0.ffn_up.weight' has the shape (256, 512), but the config asks for (512, 256)" in (
        message
    )


def test_undecodable_type(path):
    rewritten(path, {"blk.0.ffn_up.weight": np.zeros((512, 256), np.int8)})
    assert "'blk.0.ffn_up.weight' is of type I8, which cannot be decoded" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"qwen2.block_count": 1}, "no part of a Qwen2.5 model"),
        ({"qwen2.block_count": 3}, "'blk.2.attn_norm.weight'"),
        ({"qwen2.block_count": 9999}, "9999 layers, but the checkpoint only 26 tensors"),
        ({"qwen2.block_count": 2**31}, "num_layers is 2147483648, but it must be at most 10000"),
        ({"qwen2.embedding_length": 128}, "'token_embd.weight' has the shape (320, 256)"),
        ({"qwen2.feed_forward_length": 511}, "'blk.0.ffn_gate.weight' has the shape (512, 256)"),
        ({"qwen2.attention.head_count_kv": 3}, "'blk.0.attn_k.weight' has the shape (64, 256)"),
        ({"tokenizer.ggml.tokens": ["x"] * 321}, "321 tokens, but token_embd.weight only 320 rows"),
    ],
)
def test_metadata_against_tensors(path, changes, problem):
    write_gguf(path, CONFIG, PARAMS, metadata=changes)
    assert problem in refusal(path)


def test_padding_rows_are_fine(path):
    write_gguf(path, CONFIG, PARAMS, metadata={"tokenizer.ggml.tokens": ["x"] * 300})
    assert open_checkpoint(path).config.vocab_size == 320


# Values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite(path, dtype):
    values = PARAMS[Q_PROJ].copy()
    values[5, 7] = np.nan
    write_gguf(path, CONFIG, PARAMS | {Q_PROJ: values})
    assert "'blk.0.attn_q.weight' has values that are not finite" in refusal(path, dtype)


def test_values_that_float16_cannot_hold(path):
    values = PARAMS[Q_PROJ].copy()
    values[5, 7] = 1e5
    write_gguf(path, CONFIG, PARAMS | {Q_PROJ: values})
    assert "'blk.0.attn_q.weight' has values that float16 cannot hold" in refusal(path, "float16")
    assert load_parameters(open_checkpoint(path), "bfloat16")


def test_norms_beyond_float16_stay(path):
    norm = "model.norm.weight"
    values = PARAMS[norm] + np.float32(1e5)
    write_gguf(path, CONFIG, PARAMS | {norm: values})
    loaded = load_parameters(open_checkpoint(path), "float16")
    np.testing.assert_array_equal(np.asarray(loaded["final_norm"]), values)
