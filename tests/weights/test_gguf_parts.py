"""GGUF checkpoints of several files, and checksums of one and of several."""

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType as Value

from qwen_jax.errors import UserError
from qwen_jax.weights import checksum
from qwen_jax.weights.checkpoint import open_checkpoint
from qwen_jax.weights.gguf_file import open_gguf
from qwen_jax.weights.open_files import OpenFiles
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf
from tests.weights.gguf_bytes import TOKENIZER, Bytes, pair, refusal, tensor


@pytest.fixture
def split(path) -> list[Path]:
    config = tiny_config(num_layers=1)
    write_gguf(path, config, random_parameters(config), split_max_tensors=5, metadata=TOKENIZER)
    parts = sorted(path.parent.glob("model-*.gguf"))
    assert len(parts) == 3
    return parts


def test_split_files_open_by_any_part(split, path):
    config = tiny_config(num_layers=1)
    written = write_gguf(path, config, random_parameters(config))
    whole = open_gguf(written.path)
    for part in split:
        file = open_gguf(part)
        assert file.paths == tuple(split)
        assert file.metadata["tokenizer.ggml.tokens"] == TOKENIZER["tokenizer.ggml.tokens"]
        assert file.tensors.keys() == whole.tensors.keys()
        for name in whole.tensors:
            np.testing.assert_array_equal(file.raw(name), whole.raw(name))


def test_missing_part_is_named(split):
    split[1].unlink()
    message = refusal(split[0])
    assert "of the 3 parts" in message and f"1 is missing ({split[1].name})" in message
    split[1].mkdir()
    assert f"1 is missing ({split[1].name})" in refusal(split[2])


def test_missing_first_part_of_a_directory(split):
    split[0].unlink()
    with pytest.raises(UserError, match=rf"1 is missing \({split[0].name}\)"):
        open_checkpoint(split[0].parent)


def test_renamed_part(split):
    other = split[0].with_name("other.gguf")
    split[0].rename(other)
    assert "split.count is 3, but the name" in refusal(other)


def test_swapped_parts(split):
    one, two = split[1].read_bytes(), split[2].read_bytes()
    split[1].write_bytes(two)
    split[2].write_bytes(one)
    with pytest.raises(UserError, match=r"00002-of-00003.gguf: split.no is 2, but its name says 1"):
        open_gguf(split[0])


def split_part(no: int, name: str, total: int = 2, count: int = 2) -> Bytes:
    keys = {"split.no": no, "split.count": count}
    pairs = [pair(key, Value.UINT16, struct.pack("<H", value)) for key, value in keys.items()]
    pairs.append(pair("split.tensors.count", Value.INT32, struct.pack("<i", total)))
    return Bytes(tuple(pairs), (tensor(name),), bytes(16))


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (split_part(1, "a"), "'a' is already in m-00001-of-00002.gguf"),
        (split_part(1, "b", count=3), "split.count is 3, but its name says 2"),
        (Bytes(), "'split.no' holds None"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path, second, problem):
    first = split_part(0, "a").write(tmp_path / "m-00001-of-00002.gguf")
    second.write(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(UserError, match=problem):
        open_gguf(first)


def test_too_few_tensors_in_all_parts(tmp_path):
    first = split_part(0, "a", total=3).write(tmp_path / "m-00001-of-00002.gguf")
    split_part(1, "b").write(tmp_path / "m-00002-of-00002.gguf")
    assert "split.tensors.count is 3, but the 2 parts hold 2" in refusal(first)


def test_sha256_of_one_file(path):
    path.write_bytes(b"x" * 1000)
    heard = []
    opened = OpenFiles()
    digest = opened[path].sha256(lambda done, total: heard.append((done, total)))
    assert digest == hashlib.sha256(b"x" * 1000).hexdigest()
    assert heard == [(1000, 1000)]
    checksum.check_sha256(opened, [path], digest.upper())
    with pytest.raises(UserError, match=f"the SHA-256 is {digest}, not {'0' * 64}"):
        checksum.check_sha256(opened, [path], "0" * 64)
    with pytest.raises(UserError, match="'abc' is not 64 hexadecimal digits"):
        checksum.check_sha256(opened, [path], "abc")


def test_sha256_of_split_files_is_one_for_each(split):
    hashes = [hashlib.sha256(part.read_bytes()).hexdigest() for part in split]
    open_checkpoint(split[1], sha256=", ".join(hashes))
    with pytest.raises(UserError, match=rf"covers one file and the model is 3 \({split[0].name},"):
        open_checkpoint(split[0], sha256=hashes[0])
    with pytest.raises(UserError, match=r"00001-of-00003\.gguf: the SHA-256 is"):
        open_checkpoint(split[0], sha256=",".join(reversed(hashes)))
