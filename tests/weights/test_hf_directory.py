"""Directories of safetensors: one file, shards, and indices that disagree with them."""

import errno
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.weights.blocks import decode_into
from qwen_jax.weights.checkpoint import open_checkpoint
from qwen_jax.weights.hf_directory import open_directory
from tests.tiny_checkpoints import random_parameters, tiny_config, write_hf

CONFIG = tiny_config(num_layers=1)
PARAMS = random_parameters(CONFIG)
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", CONFIG, PARAMS, dtype="bfloat16").path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", CONFIG, PARAMS, shards=3).path


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    heard: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: heard.append(text % args))
    return heard


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_directory(directory)
    message = str(caught.value)
    assert str(directory) in message and message.endswith(".") and "\n" not in message
    return message


def reindex(directory: Path, **changes: str | None) -> None:
    """Moves tensors in the index, adds some, and with None drops some."""
    index = directory / INDEX
    content = json.loads(index.read_text())
    content["weight_map"] |= changes
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v is not None}
    index.write_text(json.dumps(content))


def assert_whole(directory: Path, values: dict[str, np.ndarray] = PARAMS) -> None:
    files = open_directory(directory)
    assert files.tensors.keys() == values.keys()
    for name, expected in values.items():
        out = np.empty(expected.shape, np.float32)
        assert decode_into(files.raw(name), files.tensors[name].type, out)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_values_are_those_the_library_wrote(tmp_path, dtype, shards, warnings):
    config = tiny_config(tied=False)
    written = write_hf(tmp_path, config, random_parameters(config), dtype=dtype, shards=shards)
    assert_whole(tmp_path, written.parameters)
    files = open_directory(tmp_path)
    assert len(files.paths) == shards
    assert files.metadata["hidden_size"] == config.hidden_size
    assert not warnings


def test_no_config(directory):
    (directory / "config.json").unlink()
    assert "config.json: the file can't be read" in refusal(directory)


def test_damaged_config(directory):
    (directory / "config.json").write_bytes(b'{"a": 1, "a": 2}')
    assert "config.json: the key 'a' appears twice" in refusal(directory)


def test_no_weights(directory):
    (directory / "model.safetensors").rename(directory / "qwen.safetensors")
    message = refusal(directory)
    assert "neither model.safetensors nor shards of one, only qwen.safetensors; if one" in message
    (directory / "qwen.safetensors").unlink()
    assert "the directory has no safetensors; download" in refusal(directory)


def test_missing_shard_is_named(sharded):
    (sharded / SHARDS[1]).unlink()
    assert f"of the 3 shards, 1 is not here ({SHARDS[1]})" in refusal(sharded)
    (sharded / INDEX).unlink()
    assert f"of the 3 shards, 1 is not here ({SHARDS[1]})" in refusal(sharded)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 3, "", "a\0b", None])
def test_index_may_name_only_files_beside_it(sharded, warnings, file):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"] | {"t": file}
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_whole(sharded)
    assert len(warnings) == 1
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"t": file}}))
    (sharded / SHARDS[1]).unlink()
    assert f"1 is not here ({SHARDS[1]})" in refusal(sharded)


def test_shards_without_an_index(sharded, warnings):
    (sharded / INDEX).unlink()
    (sharded / "model.safetensors").mkdir()
    for other in ("consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copy(sharded / SHARDS[0], sharded / other)
    assert_whole(sharded)
    assert not warnings


def test_two_sets_without_an_index(sharded):
    (sharded / INDEX).unlink()
    shutil.copy(sharded / SHARDS[0], sharded / "model-00001-of-00001.safetensors")
    assert "has sets of 1 and of 3 shards, and no index that says which counts" in refusal(sharded)


DAMAGE = st.one_of(
    st.binary(max_size=3),
    st.sampled_from([b'"', b"{", b"}", b",", b"[]", b"null", b"NaN", b"\\ud800", b"9" * 30]),
)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), name=st.sampled_from(["config.json", INDEX, SHARDS[0]]))
def test_random_damage(sharded, data, name):
    """Any file of a directory with bytes changed: it opens, or one sentence says why not."""
    original = (sharded / name).read_bytes()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 2))):
        position = data.draw(st.integers(0, min(len(content), 2000)))
        content[position : position + data.draw(st.integers(0, 40))] = data.draw(DAMAGE)
    (sharded / name).write_bytes(content)
    try:
        open_checkpoint(sharded)
    except UserError as error:
        assert str(sharded) in str(error) and "\n" not in str(error)
    (sharded / name).write_bytes(original)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "changes",
    [
        {"ghost": SHARDS[0]},
        {NORM: None},
        {NORM: SHARDS[0]},
        {NORM: None, "norm.weight": SHARDS[2]},
        {NORM: "model-00001-of-00009.safetensors"},
    ],
)
def test_an_index_that_disagrees_with_its_shards(sharded, warnings, changes):
    reindex(sharded, **changes)
    assert_whole(sharded)
    (warning,) = warnings
    assert "the index has" in warning and "the shards count" in warning


def test_an_index_of_another_conversion(sharded, warnings):
    index = {"weight_map": dict.fromkeys(PARAMS, "model-00001-of-00001.safetensors")}
    (sharded / INDEX).write_text(json.dumps(index))
    assert_whole(sharded)
    assert len(warnings) == 1


def test_an_index_that_leaves_a_shard_out(sharded, warnings):
    index = {"weight_map": dict.fromkeys(list(PARAMS)[::3], SHARDS[0])}
    (sharded / INDEX).write_text(json.dumps(index))
    assert_whole(sharded)
    assert len(warnings) == 1


@pytest.mark.parametrize("weight_map", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_of_nothing(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps(weight_map | {"metadata": {"total_size": 1}}))
    assert_whole(sharded)


@pytest.mark.parametrize("weight_map", [{}, {"w": "part/model.safetensors"}])
def test_an_index_alone_is_not_taken_for_weights(tmp_path, weight_map):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "the directory has no safetensors; download those" in refusal(tmp_path)


def test_total_size_is_nobodys(sharded, warnings):
    content = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps(content | {"metadata": {"total_size": 1}}))
    assert_whole(sharded)
    assert not warnings


def test_one_file_comes_before_shards(sharded, tmp_path, warnings):
    """As in transformers, where model.safetensors is looked for first."""
    values = {name: value + 1 for name, value in PARAMS.items()}
    other = write_hf(tmp_path / "other", CONFIG, values).path
    shutil.copy(other / "model.safetensors", sharded)
    assert_whole(sharded, values)
    assert "read alone, since it is there; no shards are read" in warnings[0]


def test_an_index_of_one_file(directory, warnings):
    """As mlx_lm writes it."""
    index = {"weight_map": dict.fromkeys(PARAMS, "model.safetensors")}
    (directory / INDEX).write_text(json.dumps(index))
    assert len(open_directory(directory).tensors) == len(PARAMS)
    assert not warnings


def test_a_tensor_in_two_shards(sharded, tmp_path, warnings):
    """The index decides; where it does not, nobody can."""
    values = {name: value + 1 for name, value in PARAMS.items()}
    other = write_hf(tmp_path / "other", CONFIG, values).path
    names = json.loads((sharded / INDEX).read_text())["weight_map"]
    shutil.copy(other / "model.safetensors", sharded / SHARDS[2])
    expected = {n: values[n] if file == SHARDS[2] else PARAMS[n] for n, file in names.items()}
    assert_whole(sharded, expected)
    first = next(name for name, file in names.items() if file == SHARDS[0])
    reindex(sharded, **{first: None})
    assert f"{first!r} is also in {SHARDS[0]}, and" in refusal(sharded)


def test_one_that_may_be_listed_and_not_entered(directory, monkeypatch):
    """What a test that runs as root can't make."""

    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("qwen_jax.regular_files.is_there", denied)
    said = f"{directory}: it can't be read: Permission denied; change its permissions."
    with pytest.raises(UserError, match=re.escape(said)):
        open_checkpoint(directory)
