"""Files under a model's name that are something else, written by who writes such files."""

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from qwen_jax import strict_json
from qwen_jax.errors import UserError
from qwen_jax.weights.gguf_file import open_gguf
from qwen_jax.weights.open_files import OpenFiles
from qwen_jax.weights.safetensors import read_safetensors
from tests.weights.gguf_bytes import Bytes, tensor

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:fdf756fa7fcbe7404d5c60e26bff1a0c8b8aa1f72ced49e7dd0210fe288fb7fe\n"
    "size 988097824\n"
)
GGUF = Bytes(tensors=(tensor(),), data=bytes(32)).build()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x" * 1000)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.gguf"), io.BytesIO(b""))
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones(4))
    return buffer.getvalue()


KINDS = {
    "git-lfs": (POINTER.encode(), "a git-lfs pointer to the file of 988097824 bytes"),
    "web page": (b"\n<!DOCTYPE html>\n<html><head>", "a web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied', "a web page"),
    "text": (b"Entry not found", "text, not {expected}, and begins 'Entry not found'"),
    "zip": (zipped("model.gguf"), "a zip archive"),
    "PyTorch": (zipped("archive/data.pkl"), "a PyTorch checkpoint"),
    **{f"pickle {n}": (pickle.dumps({"a": [1]}, n), "a PyTorch checkpoint") for n in (2, 3, 4, 5)},
    "gzip": (gzip.compress(GGUF), "compressed by gzip"),
    "bzip2": (bz2.compress(GGUF), "compressed by bzip2"),
    "xz": (lzma.compress(GGUF), "compressed by xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00\x01\x00\x00abc", "compressed by zstd"),
    "tar": (tarred(), "a tar archive"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0\0\0\0", "an HDF5 file"),
    "NumPy": (npy(), "a NumPy array"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x051.9.0:", "an ONNX model"),
    "ggml": (b"lmgg\x00\x7d\x00\x00", "before GGUF (2023), hence before Qwen2"),
    "ggjt": (b"tjgg\x03\x00\x00\x00", "before GGUF (2023), hence before Qwen2"),
    "ggla": (b"algg\x01\x00\x00\x00", "a LoRA adapter of the GGML format"),
    "zeros": (bytes(1000), "all zeros where it begins"),
}
READERS = {
    "model.gguf": ("GGUF", open_gguf),
    "model.safetensors": ("safetensors", lambda path: read_safetensors(path, OpenFiles())),
    "tokenizer.json": ("JSON", strict_json.read_object),
}


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        READERS.get(path.name, READERS["model.gguf"])[1](path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.endswith(".") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replace(" ", "_"))
def test_another_kind_is_told_by_its_first_bytes(tmp_path, name, kind):
    content, sentence = KINDS[kind]
    expected, _ = READERS[name]
    message = refusal(tmp_path / name, content)
    assert f"the file is {sentence.format(expected=expected)}" in message or (
        sentence.format(expected=expected) in message
    )
    assert "damaged" not in message


def test_formats_under_each_others_names(tmp_path):
    tensors = save({"a": np.ones(4)})
    assert "is a safetensors file; give the directory" in refusal(tmp_path / "model.gguf", tensors)
    assert "is a GGUF file" in refusal(tmp_path / "model.safetensors", GGUF)
    assert "is a GGUF file" in refusal(tmp_path / "tokenizer.json", GGUF)
    reply = b'{"error": "Access to this model is restricted"}'
    for name in ("model.gguf", "model.safetensors"):
        assert '{"error": "Access to this' in refusal(tmp_path / name, reply)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("q.gguf.part1of2", "`cat 'q.gguf.part'* > 'q.gguf'`"),
        ("q.gguf.part0", "`cat 'q.gguf.part'* > 'q.gguf'`"),
        ("q.gguf.partaa", "`cat 'q.gguf.part'* > 'q.gguf'`"),
        ("q.gguf-split-a", "`cat 'q.gguf-split-'* > 'q.gguf'`"),
        ("q.gguf-part-b", "`cat 'q.gguf-part-'* > 'q.gguf'`"),
        ("q.gguf.001", "`cat 'q.gguf.'* > 'q.gguf'`"),
        ("q.gguf.aa", "`cat 'q.gguf.'* > 'q.gguf'`"),
        ("q.gguf.part", "a download under way"),
        ("q.gguf.partial", "a download under way"),
        ("abc.incomplete", "a download under way"),
        ("q.gguf.crdownload", "a download under way"),
        ("q.gguf.aria2", "a download under way"),
    ],
)
def test_pieces_are_told_by_their_names(tmp_path, name, told):
    """The first piece has a header and too few bytes, the second no header at all."""
    path = tmp_path / name
    for piece in (GGUF[:-20], b"\x17" * 100):
        message = refusal(path, piece)
        assert told in message and "its name says" in message
    path.write_bytes(GGUF)
    assert open_gguf(path).tensors.keys() == {"t"}


def test_aria2_says_that_a_download_is_unfinished(tmp_path):
    (tmp_path / "q.gguf.aria2").touch()
    assert "as q.gguf.aria2 beside it says" in refusal(tmp_path / "q.gguf", GGUF[:-20])


def test_few_bytes_are_what_they_are(tmp_path):
    assert refusal(tmp_path / "m.gguf", b"{}").startswith("the file begins with b'{}', and a GGUF")
    assert "the version lies beyond the end" in refusal(tmp_path / "m.gguf", b"GGUF")


@pytest.mark.parametrize("name", ["qwen2.5-0.5b.gguf", "part1.gguf", "a-00001-of-00002.gguf"])
def test_ordinary_names_say_nothing(tmp_path, name):
    assert "the file has only" in refusal(tmp_path / name, GGUF[:-20])
