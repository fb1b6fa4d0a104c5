"""Hugging Face directories: written by the safetensors library, and damaged by hand."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.weights.blocks import decode_into
from qwen_jax.weights.safetensors import open_safetensors
from tests.tiny_checkpoints import random_parameters, tiny_config, write_hf


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config = tiny_config(num_layers=1)
    return write_hf(tmp_path / "hf", config, random_parameters(config), dtype="bfloat16").path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    config = tiny_config(num_layers=1)
    return write_hf(tmp_path / "hf", config, random_parameters(config), shards=3).path


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_safetensors(directory)
    message = str(caught.value)
    assert str(directory) in message and message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_values_are_those_the_library_wrote(tmp_path, dtype, shards):
    config = tiny_config(tied=False)
    params = random_parameters(config)
    written = write_hf(tmp_path, config, params, dtype=dtype, shards=shards)
    files = open_safetensors(tmp_path)
    assert files.tensors.keys() == params.keys()
    assert len(files.paths) == shards
    assert files.metadata["hidden_size"] == config.hidden_size
    for name, expected in written.parameters.items():
        info = files.tensors[name]
        assert info.shape == expected.shape
        out = np.empty(info.shape, np.float32)
        assert decode_into(files.raw(name), info.type, out)
        np.testing.assert_array_equal(out, expected)


def test_no_config(directory):
    (directory / "config.json").unlink()
    assert "config.json: the file cannot be read" in refusal(directory)


def test_no_weights(directory):
    (directory / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(directory)


def test_damaged_config(directory):
    (directory / "config.json").write_bytes(b'{"a": 1, "a": 2}')
    assert "config.json: the key 'a' appears twice" in refusal(directory)


def test_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = refusal(sharded)
    assert "of the 3 shards, 1 are missing (model-00002-of-00003.safetensors)" in message


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 3, "", "a\0b"])
def test_index_may_name_only_files_beside_it(sharded, file):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t": file}}))
    assert "'t' is in " in refusal(sharded)


def test_index_and_shards_must_agree(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    assert "'ghost' is in only one of this shard and" in refusal(sharded)
    index.write_text("{}")
    assert "weight_map is missing" in refusal(sharded)


def shard(header: object, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


BAD = {
    "too short": (b"1234", "the header claims"),
    "length": (struct.pack("<Q", 2**63) + bytes(99), "claims to end at byte 9223372036854775816"),
    "no json": (shard(b"{"), "not JSON"),
    "list": (shard([1]), "must be a JSON object"),
    "entry": (shard({"t": 1}), "'t' has the dtype None"),
    "dtype": (shard(entry(dtype="F6_E2M3")), "'t' has the dtype 'F6_E2M3', and only F64"),
    "dtype list": (shard(entry(dtype=[])), "'t' has the dtype"),
    "shape": (shard(entry(shape=[-4])), r"'t' has the shape [-4], not"),
    "shape truth": (shard(entry(shape=[True])), "'t' has the shape [True]"),
    "shape empty": (shard(entry(shape=[0])), "'t' has the shape [0]"),
    "shape text": (shard(entry(shape="4")), "'t' has the shape '4'"),
    "offsets": (shard(entry(data_offsets=[0])), "'t' has the data_offsets [0]"),
    "offsets float": (shard(entry(data_offsets=[0, 16.0])), "'t' has the data_offsets"),
    "size": (shard(entry(shape=[5])), "which do not fit"),
    "reversed": (shard(entry(data_offsets=[16, 0])), "which do not fit"),
    "overflow": (shard(entry(shape=[2**40] * 3)), "which do not fit"),
    "truncated": (shard(entry(), bytes(15)), "'t' ends at byte"),
    "overlap": (shard(entry() | {"u": entry()["t"]}), "'t' and 'u' overlap"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "_"))
def test_one_fault_one_sentence(directory, case):
    content, problem = BAD[case]
    (directory / "model.safetensors").write_bytes(content)
    assert problem in refusal(directory)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage(directory, data):
    values = np.ones((2, 3), ml_dtypes.bfloat16)
    header = {
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
    }
    content = bytearray(shard(header, values.tobytes() + bytes(4)))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 2))] = data.draw(
            st.one_of(st.binary(max_size=2), st.sampled_from([b"9", b"-", b"[", b"]", b'"']))
        )
    (directory / "model.safetensors").write_bytes(content)
    try:
        files = open_safetensors(directory)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for name, info in files.tensors.items():
        assert files.raw(name).nbytes == info.nbytes
