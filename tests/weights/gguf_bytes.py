"""Builds GGUF files byte by byte, so that a test can put any fault in any place."""

import dataclasses
import struct
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value

from qwen_jax.errors import UserError
from qwen_jax.weights.gguf_file import open_gguf

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "Ġc", "é", "<|im_end|>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 1, 3],
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.eos_token_id": 4,
    "scores": [0.5, -1.0],
}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(
    name: str | bytes = "t",
    dims: tuple[int, ...] = (4,),
    kind: int = Type.F32,
    offset: int = 0,
    num_dims: int | None = None,
) -> bytes:
    count = len(dims) if num_dims is None else num_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


@dataclasses.dataclass
class Bytes:
    """A GGUF file in parts; counts default to the truth."""

    pairs: tuple[bytes, ...] = ()
    tensors: tuple[bytes, ...] = ()
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    num_tensors: int | None = None
    num_pairs: int | None = None
    alignment: int = 32

    def build(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_pairs = len(self.pairs) if self.num_pairs is None else self.num_pairs
        counts = struct.pack("<QQ", num_tensors, num_pairs)
        header = b"".join([self.magic, self.version, counts, *self.pairs, *self.tensors])
        return header + bytes(-len(header) % self.alignment) + self.data

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path


ARCHITECTURE = pair("general.architecture", Value.STRING, string("qwen2"))


def refusal(path: Path) -> str:
    """The one sentence; every refusal names the file."""
    with pytest.raises(UserError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message
    return message
