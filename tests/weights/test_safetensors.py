"""safetensors files: accepted and refused as the safetensors library does, and damaged by hand."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.weights.open_files import OpenFiles
from qwen_jax.weights.safetensors import read_safetensors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_safetensors(path, OpenFiles())
    message = str(caught.value)
    assert (
        message.startswith((f"{path}: ", f"{path}, its header: "))
        and message.endswith(".")
        and "\n" not in message
    )
    return message


def library_accepts(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            return opened.keys() is not None
    except safetensors.SafetensorError:
        return False


def shard(header: object, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


def empty(at: int, shape: tuple[int, ...] = (0,)) -> dict[str, object]:
    return {"z": {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at]}}


TEXT = json.dumps(entry()).encode()
# 4 values each, and the bytes they take.
SIZES = {
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"], 4),
    **dict.fromkeys(["F8_E5M2FNUZ", "F8_E4M3FNUZ"], 4),
    **dict.fromkeys(["U16", "I16", "F16", "BF16"], 8),
    **dict.fromkeys(["U32", "I32", "F32"], 16),
    **dict.fromkeys(["U64", "I64", "F64", "C64"], 32),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 3),
    "F4": 2,
}
GOOD = {
    "one tensor": shard(entry()),
    "none": shard({}, b""),
    "metadata": shard({"__metadata__": {"format": "pt"}} | entry()),
    "metadata null": shard({"__metadata__": None} | entry()),
    "spaces around": shard(b" \n" + TEXT + b"\t  "),
    "further field": shard(entry(more=[1])),
    "scalar": shard(entry(shape=[], data_offsets=[0, 4]), bytes(4)),
    "empty at the end": shard(entry() | empty(16)),
    "empty at the start": shard(empty(0, (3, 0, 2)) | entry()),
    "order of the header": shard(
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [16, 17]}} | entry(), bytes(17)
    ),
    "no name": shard({"": entry()["t"]}),
    **{
        f"dtype {dtype}": shard(entry(dtype=dtype, data_offsets=[0, size]), bytes(size))
        for dtype, size in SIZES.items()
    },
}
BAD = {
    "too short": (b"12\0", "the file has 3 bytes, and its header's length alone takes 8"),
    "length": (struct.pack("<Q", 2**63) + bytes(99), "claims 9223372036854775808 bytes, above"),
    "cut header": (shard(entry(), b"")[:-5], "the header claims to end at byte 70, but the file"),
    "header empty": (bytes(8), "the header is no JSON object"),
    "list": (shard([1]), "the header is no JSON object"),
    "byte order mark": (shard(b"\xef\xbb\xbf" + TEXT), "the header is no JSON object"),
    "not UTF-8": (shard(b'{"\xff": 1}'), "the header is not UTF-8 at its byte 2; this is no well"),
    "no json": (shard(b"{"), "not JSON"),
    "bytes after": (shard(TEXT + b"\0"), "not JSON"),
    "NaN": (shard(TEXT[:-2] + b', "x": NaN}}'), "NaN is no number of JSON"),
    "field twice": (shard(TEXT[:-2] + b', "shape": [4]}}'), "the key 'shape' appears twice"),
    "metadata twice": (
        shard(b'{"__metadata__": {}, "__metadata__": {}}', b""),
        "the key '__metadata__' appears twice",
    ),
    "metadata number": (shard({"__metadata__": {"a": 1}} | entry()), "__metadata__ is {'a': 1}"),
    "metadata list": (shard({"__metadata__": []} | entry()), "__metadata__ is []"),
    "half a character": (shard(b'{"\\ud800": {}}'), "half a character"),
    "entry": (shard({"t": 1}), "'t' has the dtype None"),
    "dtype": (shard(entry(dtype="I4")), "'t' has the dtype 'I4', and only F64"),
    "dtype list": (shard(entry(dtype=[])), "'t' has the dtype"),
    "shape": (shard(entry(shape=[-4])), r"'t' has the shape [-4], not"),
    "shape truth": (shard(entry(shape=[True])), "'t' has the shape [True]"),
    "shape text": (shard(entry(shape="4")), "'t' has the shape '4'"),
    "shape large": (
        shard(empty(0, (0, 2**64)), b""),
        "'z' has the shape [0, 18446744073709551616]",
    ),
    "offsets": (shard(entry(data_offsets=[0])), "'t' has the data_offsets [0]"),
    "offsets float": (shard(entry(data_offsets=[0, 16.0])), "'t' has the data_offsets"),
    "size": (shard(entry(shape=[5])), "which do not fit"),
    "half a byte": (shard(entry(dtype="F4", shape=[3], data_offsets=[0, 1])), "do not fit"),
    "reversed": (shard(entry(data_offsets=[16, 0])), "which do not fit"),
    "overflow": (shard(entry(shape=[2**40] * 3)), "which do not fit"),
    # The product of all has 180,000 digits, and takes minutes.
    "overflow of many": (shard(entry(shape=[2] * 600_000)), "which do not fit"),
    "overflow of nothing": (shard(empty(0, (2**40, 2**40, 0)), b""), "which do not fit"),
    "truncated": (shard(entry(), bytes(15)), "'t', ends at byte 16 of the data, but the file has"),
    "bytes after the last": (shard(entry(), bytes(18)), "2 bytes follow the last tensor"),
    "bytes of nobody": (shard({}, bytes(1)), "1 bytes follow the last tensor"),
    "hole at the start": (
        shard(entry(data_offsets=[4, 20]), bytes(20)),
        "'t' begins at byte 4 of the data, but the one before it ends at 0",
    ),
    "hole": (
        shard(entry() | {"u": entry(data_offsets=[20, 36])["t"]}, bytes(36)),
        "'u' begins at byte 20 of the data, but the one before it ends at 16",
    ),
    "overlap": (
        shard(entry() | {"u": entry(data_offsets=[8, 24])["t"]}, bytes(24)),
        "'u' begins at byte 8 of the data, but the one before it ends at 16",
    ),
    "same place": (shard(entry() | {"u": entry()["t"]}), "'u' begins at byte 0"),
    "empty within": (shard(entry() | empty(8)), "'z' begins at byte 8"),
    "empty beyond": (shard(entry() | empty(20)), "'z' begins at byte 20"),
}


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.replace(" ", "_"))
def test_what_the_library_accepts(file, case):
    file.write_bytes(GOOD[case])
    read_safetensors(file, OpenFiles())
    assert library_accepts(file)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "_"))
def test_one_fault_one_sentence(file, case):
    content, problem = BAD[case]
    file.write_bytes(content)
    assert problem in refusal(file)
    assert not library_accepts(file)


def test_a_name_twice_is_refused_where_the_library_takes_the_last(file):
    file.write_bytes(shard(b'{"t": %s, "t": %s}' % ((json.dumps(entry()["t"]).encode(),) * 2)))
    assert "the key 't' appears twice" in refusal(file)
    assert library_accepts(file)


DAMAGE = st.one_of(
    st.binary(max_size=2),
    st.sampled_from([b"9", b"-", b"[", b"]", b'"', b",", b"0", b" ", b'"U8"', b"1e1", b"null"]),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_damage_is_judged_as_by_the_library(file, data):
    values = np.ones((2, 3), ml_dtypes.bfloat16)
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
    }
    content = bytearray(shard(header, values.tobytes() + bytes(4)))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 2))] = data.draw(DAMAGE)
    file.write_bytes(content)
    try:
        accepted = read_safetensors(file, OpenFiles()) is not None
    except UserError as error:
        assert "\n" not in str(error)
        assume("appears twice" not in str(error))
        accepted = False
    assert accepted == library_accepts(file)
