"""The GGUF reader: against gguf's own writer and reader, and against damaged files."""

import os
import re
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from gguf.constants import GGUFEndian
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.weights.checkpoint import open_checkpoint
from qwen_jax.weights.gguf_cursor import MAX_HEADER_BYTES
from qwen_jax.weights.gguf_file import open_gguf
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf
from tests.weights.gguf_bytes import (
    ARCHITECTURE,
    TOKENIZER,
    Bytes,
    array,
    pair,
    refusal,
    string,
    tensor,
)

# Well-formed files


def test_everything_is_read_as_gguf_wrote_it(path):
    config = tiny_config(tied=False)
    params = random_parameters(config)
    write_gguf(path, config, params, types="Q4_K", metadata=TOKENIZER)
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    assert ours.version == 3
    fields = {k: v for k, v in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, field in fields.items():
        value = ours.metadata[key]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    assert ours.metadata["tokenizer.ggml.tokens"] == TOKENIZER["tokenizer.ggml.tokens"]
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for expected in theirs.tensors:
        info = ours.tensors[expected.name]
        assert info.shape == tuple(int(n) for n in expected.shape)[::-1]
        assert (info.type, info.nbytes) == (expected.tensor_type, expected.n_bytes)
        assert (info.path, info.offset) == (path, expected.data_offset)
        raw = ours.raw(info.name)
        assert raw.dtype == np.uint8 and raw.ndim == 1 and not raw.flags.writeable
        np.testing.assert_array_equal(raw, expected.data.reshape(-1).view(np.uint8))


SCALARS = [
    (Value.UINT8, "<B", 255),
    (Value.INT8, "<b", -128),
    (Value.UINT16, "<H", 65535),
    (Value.INT16, "<h", -32768),
    (Value.UINT32, "<I", 2**32 - 1),
    (Value.INT32, "<i", -(2**31)),
    (Value.UINT64, "<Q", 2**64 - 1),
    (Value.INT64, "<q", -(2**63)),
    (Value.FLOAT32, "<f", 0.5),
    (Value.FLOAT64, "<d", 0.1),
    (Value.BOOL, "<B", True),
]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("kind", "code", "value"), SCALARS)
def test_every_value_type_alone_and_in_arrays(path, version, kind, code, value):
    item = struct.pack(code, value)
    pairs = (
        pair("one", kind, item),
        pair("many", Value.ARRAY, array(kind, 3, item * 3)),
        pair("none", Value.ARRAY, array(kind, 0, b"")),
        pair("nested", Value.ARRAY, array(Value.ARRAY, 2, array(kind, 2, item * 2) * 2)),
    )
    metadata = open_gguf(Bytes(pairs, version=struct.pack("<I", version)).write(path)).metadata
    assert metadata["one"] == value and type(metadata["one"]) is type(value)
    assert metadata["many"].tolist() == [value] * 3
    assert metadata["none"].tolist() == []
    assert [inner.tolist() for inner in metadata["nested"]] == [[value] * 2] * 2


def test_alignment_moves_the_data(path):
    pairs = (pair("general.alignment", Value.UINT32, struct.pack("<I", 256)),)
    data = np.arange(4, dtype="<f4").tobytes()
    file = open_gguf(Bytes(pairs, (tensor(),), data, alignment=256).write(path))
    assert file.tensors["t"].offset == 256
    assert file.raw("t").tobytes() == data


def test_only_the_last_tensor_needs_no_padding_and_bytes_after_it_are_nobodys(path):
    """As llama.cpp has it: it reads up to the last tensor's end and looks no further."""
    tensors = (tensor("a", dims=(9,)), tensor("b", offset=64))
    for after in (b"", bytes(16), bytes(99)):
        data = np.arange(20, dtype="<f4").tobytes()
        file = open_gguf(Bytes(tensors=tensors, data=data + after).write(path))
        assert file.raw("a").tobytes() == data[:36]
        assert file.raw("b").tobytes() == data[64:]


def test_real_vocabulary(qwen2_vocabulary):
    """A header of Qwen's size in under half a second."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        metadata = open_gguf(qwen2_vocabulary).metadata
        times.append(time.perf_counter() - start)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert (len(tokens), len(metadata["tokenizer.ggml.merges"])) == (151936, 151387)
    assert tokens[151643:151646] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert metadata["tokenizer.ggml.token_type"].shape == (151936,)
    assert min(times) < 0.5


def test_vocabulary_alone_is_no_model(qwen2_vocabulary):
    with pytest.raises(UserError, match="a vocabulary and no weights"):
        open_checkpoint(qwen2_vocabulary)


# Damaged files: one fault each


U32 = struct.Struct("<I").pack
HUGE = 2**63
BAD = {
    "no magic": (Bytes(magic=b"GGML"), "begins with b'GGML'"),
    "version 1": (Bytes(version=U32(1)), "version is 1"),
    "version 4": (Bytes(version=U32(4)), "version is 4"),
    "big-endian": (Bytes(version=struct.pack(">I", 3)), "big-endian"),
    "tensor count": (Bytes(num_tensors=HUGE), f"the number of tensors is {HUGE}"),
    "key count": (Bytes(num_pairs=HUGE), f"the number of keys is {HUGE}"),
    "key missing": (Bytes((ARCHITECTURE,), num_pairs=2), "key 1 has no name"),
    "key twice": (Bytes((ARCHITECTURE,) * 2), "'general.architecture' appears twice"),
    "key not UTF-8": (Bytes((pair(b"\xff", Value.BOOL, b"\0"),)), "key 0 is not valid UTF-8"),
    "string too long": (
        Bytes((pair("k", Value.STRING, struct.pack("<Q", HUGE)),)),
        "'k' lies beyond the end",
    ),
    "string not UTF-8": (
        Bytes((pair("k", Value.STRING, string(b"\xc3")),)),
        "'k' is not valid UTF-8",
    ),
    "value type": (Bytes((pair("k", 13, b""),)), "'k' has the unknown type 13"),
    "element type": (
        Bytes((pair("k", Value.ARRAY, array(99, 0, b"")),)),
        "'k': an element has the unknown type 99",
    ),
    "truth value": (Bytes((pair("k", Value.BOOL, b"\2"),)), "'k' is a truth value of 2"),
    "truth values": (
        Bytes((pair("k", Value.ARRAY, array(Value.BOOL, 2, b"\1\3")),)),
        "'k' is a truth value of 3",
    ),
    "array length": (
        Bytes((pair("k", Value.ARRAY, array(Value.UINT64, HUGE, b"")),)),
        f"'k': the length is {HUGE}",
    ),
    "string array length": (
        Bytes((pair("k", Value.ARRAY, array(Value.STRING, 9, string("a") * 8)),)),
        "'k'.* lies beyond the end",
    ),
    "strings not UTF-8": (
        Bytes((pair("k", Value.ARRAY, array(Value.STRING, 1, string(b"\x80"))),)),
        "'k' is not valid UTF-8",
    ),
    "nesting": (
        Bytes((pair("k", Value.ARRAY, array(Value.ARRAY, 1, b"") * 9 + bytes(99)),)),
        "'k' nests arrays more than 4 deep",
    ),
    "alignment 0": (
        Bytes((pair("general.alignment", Value.UINT32, U32(0)),)),
        "general.alignment is 0",
    ),
    "alignment 24": (
        Bytes((pair("general.alignment", Value.UINT32, U32(24)),)),
        "general.alignment is 24",
    ),
    "alignment text": (
        Bytes((pair("general.alignment", Value.STRING, string("32")),)),
        "'general.alignment' holds '32', not an integer",
    ),
    "split.count truth": (
        Bytes((pair("split.count", Value.BOOL, b"\1"),)),
        "'split.count' holds True, not an integer",
    ),
    "tensor twice": (Bytes(tensors=(tensor(), tensor(offset=32))), "'t' appears twice"),
    "tensor name": (Bytes(tensors=(tensor(b"\xff"),)), "tensor 0 is not valid UTF-8"),
    "a long name": (
        Bytes(tensors=(tensor("é" * 32),), data=bytes(64)),
        "tensor 0 has a name of 64 bytes, above 63",
    ),
    "no dimensions": (Bytes(tensors=(tensor(dims=()),), data=bytes(64)), "'t' has 0 dimensions"),
    "five dimensions": (Bytes(tensors=(tensor(dims=(1,) * 5),)), "'t' has 5 dimensions"),
    "many dimensions": (Bytes(tensors=(tensor(num_dims=2**32 - 1),)), "'t' has 4294967295"),
    "empty": (Bytes(tensors=(tensor(dims=(4, 0)),)), r"'t' has the shape \(0, 4\)"),
    "product overflow": (
        Bytes(tensors=(tensor(dims=(2**32, 2**32)),)),
        r"'t' has the shape .*, which no file",
    ),
    "tensor type": (Bytes(tensors=(tensor(kind=2**20),)), "'t' has the type 1048576, which no"),
    "row size": (
        Bytes(tensors=(tensor(dims=(33,), kind=Type.Q8_0),)),
        "'t' has rows of 33 values, no multiple of Q8_0's blocks of 32",
    ),
    "offset unaligned": (
        Bytes(tensors=(tensor("a"), tensor("b", offset=16)), data=bytes(64)),
        "'b' has the offset 16, but .* the alignment 32, add up to 32",
    ),
    "offset far": (
        Bytes(tensors=(tensor(offset=2**63),), data=bytes(64)),
        "'t' has the offset 9223372036854775808, but .* add up to 0",
    ),
    "overlap": (
        Bytes(tensors=(tensor("a", dims=(9,)), tensor("b", offset=32)), data=bytes(96)),
        "'b' has the offset 32, but .* add up to 64",
    ),
    "same place": (
        Bytes(tensors=(tensor("a"), tensor("b")), data=bytes(64)),
        "'b' has the offset 0, but .* add up to 32",
    ),
    "gap before the first": (
        Bytes(tensors=(tensor(offset=32),), data=bytes(64)),
        "'t' has the offset 32, but .* add up to 0",
    ),
    "gap": (
        Bytes(tensors=(tensor("a"), tensor("b", offset=64)), data=bytes(96)),
        "'b' has the offset 64, but .* add up to 32",
    ),
    "swapped": (
        Bytes(tensors=(tensor("a", offset=32), tensor("b")), data=bytes(64)),
        "'a' has the offset 32, but .* add up to 0",
    ),
    "past the end": (
        Bytes(tensors=(tensor(dims=(2**40,)),), data=bytes(64)),
        "'t' ends at byte .* only",
    ),
    "data missing": (Bytes(tensors=(tensor(),), data=bytes(15)), "'t' ends at byte .* only"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "_"))
def test_one_fault_one_sentence(path, case):
    file, problem = BAD[case]
    message = refusal(file.write(path))
    assert re.search(problem, message), message


@pytest.mark.parametrize(
    ("code", "name"),
    [(4, "Q4_2"), (5, "Q4_3"), (31, "Q4_0_4_4"), (33, "Q4_0_8_8"), (36, "IQ4_NL_4_4")],
)
def test_types_that_llama_cpp_has_removed(path, code, name):
    message = refusal(Bytes(tensors=(tensor(kind=code),), data=bytes(64)).write(path))
    assert f"'t' is of type {code}, {name}, which llama.cpp has removed; choose a file in Q4_0" in (
        message
    )


@pytest.mark.parametrize("code", [99, 398, 1000])
def test_types_newer_than_this_engine(path, code):
    message = refusal(Bytes(tensors=(tensor(kind=code),), data=bytes(64)).write(path))
    assert f"'t' is of type {code}, which is newer than this engine knows, or a fork's" in message


def test_files_that_cannot_be_read(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.gguf")
    assert "directory" in refusal(tmp_path)
    (tmp_path / "empty.gguf").touch()
    assert "empty" in refusal(tmp_path / "empty.gguf")


def test_a_huge_file_of_nothing_stays_small(path):
    """Sparse: terabytes claimed, and every count as large as the file can make it look."""
    many = array(Value.STRING, 2**35, b"")
    header = Bytes((pair("k", Value.ARRAY, many),)).build()
    with path.open("wb") as file:
        file.write(header)
        file.truncate(2**40)
    tracemalloc.start()
    message = refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"beyond the {MAX_HEADER_BYTES} bytes a header may have" in message
    assert peak < 1 << 20


# Fuzzing


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    """A complete checkpoint of 9 kB, 2 kB of them header."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    config = tiny_config(
        num_layers=1,
        hidden_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        ffn_size=8,
        vocab_size=8,
    )
    write_gguf(path, config, random_parameters(config), metadata=TOKENIZER)
    open_checkpoint(path)
    return path.read_bytes()


def survives(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    return opens_or_refuses(path)


def opens_or_refuses(path: Path) -> bool:
    """Whether the file opens; anything but that or a UserError is a failure of the test."""
    try:
        checkpoint = open_checkpoint(path)
    except UserError as error:
        assert "\n" not in str(error)
        return False
    for name in checkpoint.tensors:
        assert checkpoint.files.raw(name).nbytes == checkpoint.tensors[name].nbytes
    return True


def test_every_truncation_is_refused(small, path):
    path.write_bytes(small)
    with path.open("r+b") as file:
        for size in range(len(small) - 32, -1, -5):
            file.truncate(size)
            assert not opens_or_refuses(path), size


def test_every_header_byte_changed(small, path):
    path.write_bytes(small)
    header = small.index(b"output_norm.weight") + 64
    with path.open("r+b", buffering=0) as file:
        for position in range(header):
            for value in (0, 0xFF, small[position] ^ 1, small[position] ^ 0x80):
                os.pwrite(file.fileno(), bytes([value]), position)
                opens_or_refuses(path)
            os.pwrite(file.fileno(), small[position : position + 1], position)
    assert opens_or_refuses(path)


NUMBERS = st.sampled_from([0, 1, 2, 8, 9, 31, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1])


@settings(
    max_examples=400,
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_damage(small, path, data):
    content = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["byte", "number", "insert", "delete", "copy"])):
            case "byte":
                content[position] = data.draw(st.integers(0, 255))
            case "number":
                content[position : position + 8] = struct.pack("<Q", data.draw(NUMBERS))
            case "insert":
                content[position:position] = data.draw(st.binary(min_size=1, max_size=16))
            case "delete":
                del content[position : position + data.draw(st.integers(1, 64))]
            case "copy":
                content[position:position] = content[: data.draw(st.integers(1, 256))]
    survives(path, bytes(content))


@settings(max_examples=200, deadline=5000)
@given(content=st.binary(max_size=200))
def test_random_bytes_after_the_magic(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    survives(path, b"GGUF\x03\0\0\0" + content)


def test_big_endian_files_of_gguf_are_refused(path):
    config = tiny_config(num_layers=1)
    write_gguf(path, config, random_parameters(config), endian=GGUFEndian.BIG)
    assert "big-endian; convert it with gguf-convert-endian" in refusal(path)
