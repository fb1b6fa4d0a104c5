"""A bounded reader of safetensors files.

The format: https://huggingface.co/docs/safetensors. A file is the length of a JSON header, the
header and the tensors' bytes. The reader trusts nothing: see `gguf_file`. It accepts what the
reference reader (safetensors' deserialize in tensor.rs) accepts, but for a name that stands in a
header twice.
"""

import itertools
import operator
import struct
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeGuard

from gguf.constants import GGMLQuantizationType

from qwen_jax.errors import UserError
from qwen_jax.file_kinds import told_by_kind
from qwen_jax.strict_json import parse_object
from qwen_jax.weights.open_files import OpenFiles
from qwen_jax.weights.tensors import OtherType, TensorInfo, TensorType, block_size

# The header of a 72B shard has 100 kB; the bound, the reference reader's, also caps what parsing
# it can take.
MAX_HEADER_BYTES = 100_000_000

_TYPES: dict[str, TensorType] = {
    **{name: GGMLQuantizationType[name] for name in ("F64", "F32", "F16", "BF16")},
    **{name: GGMLQuantizationType[name] for name in ("I64", "I32", "I16", "I8")},
    **OtherType.__members__,
}


def read_safetensors(path: Path, opened: OpenFiles) -> dict[str, TensorInfo]:
    """The tensors of one file, by name; it is read in `opened`.

    Raises UserError for anything but well-formed safetensors. A type that cannot be computed with
    is no fault of the file: who needs the tensor will say so.
    """
    return read_with_metadata(path, opened)[1]


def read_with_metadata(
    path: Path, opened: OpenFiles, expected: Literal["safetensors", "dump"] = "safetensors"
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The same after the texts that the file's writer put beside its tensors.

    Args:
        expected: a checkpoint, which is published, or what an engine has dumped.
    """
    with told_by_kind(path, expected):
        try:
            return _parsed(path, opened)
        except _Damaged as damage:
            raise UserError(f"{path}: {damage}; {damage.ways[expected]}") from None


def _parsed(path: Path, opened: OpenFiles) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    data = opened[path].map
    if len(data) < 8:
        _fail(f"the file has {len(data)} bytes, and its header's length alone takes 8")
    (length,) = struct.unpack_from("<Q", data)
    start = 8 + length
    if length > MAX_HEADER_BYTES:
        _fail(f"the header claims {length} bytes, above {MAX_HEADER_BYTES}")
    if start > len(data):
        raise _CutOff(f"the header claims to end at byte {start}, but the file has {len(data)}")
    header = _header(data[8:start], path)
    metadata = header.pop("__metadata__", None)
    _check_metadata(metadata, path)
    tensors = {name: _tensor(name, entry, path) for name, entry in header.items()}
    _check_layout(header, path, len(data) - start)
    return metadata or {}, {name: _moved(info, start) for name, info in tensors.items()}


def _header(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        _fail(f"the header is not UTF-8 at its byte {error.start}")
    if text.lstrip(" \t\r\n")[:1] != "{":
        _fail("the header is no JSON object")
    return parse_object(text, f"{path}, its header")


def _moved(info: TensorInfo, start: int) -> TensorInfo:
    return TensorInfo(info.name, info.shape, info.type, info.path, start + info.offset)


def _check_metadata(metadata: Any, path: Path) -> None:
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if metadata is not None and not texts:
        _fail(f"__metadata__ is {metadata!r:.60}, not names with texts")


def _check_layout(header: dict[str, Any], path: Path, size: int) -> None:
    """The tensors cover the `size` bytes of data one after another, without a hole."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end:
            _fail(
                f"the tensor {name!r} begins at byte {first} of the data, but the one before it "
                f"ends at {end}",
            )
        end = last
    if end > size:
        raise _CutOff(
            f"the last tensor, {name!r}, ends at byte {end} of the data, but the file has only "
            f"{size}"
        )
    if end < size:
        _fail(f"{size - end} bytes follow the last tensor")


def _tensor(name: str, entry: Any, path: Path) -> TensorInfo:
    """One entry; its offset still counts from the start of the tensors' bytes."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, extent = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    kind = _TYPES.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise _OfOtherType(
            f"the tensor {name!r} has the dtype {dtype!r:.60}, and only {', '.join(_TYPES)} are "
            "known"
        )
    if not _naturals(shape):
        _fail(f"the tensor {name!r} has the shape {shape!r:.60}, not a list of sizes")
    if not _naturals(extent) or len(extent) != 2:
        _fail(f"the tensor {name!r} has the data_offsets {extent!r:.60}, not two integers")
    info = TensorInfo(name, tuple(shape), kind, path, extent[0])
    # Sizes are 64-bit integers on the way to the product, even where a later 0 makes it 0; a long
    # shape ends at the first that is too large, since products of thousands of digits take minutes.
    fits = all(product < 1 << 64 for product in itertools.accumulate(shape, operator.mul))
    whole = fits and info.elements % block_size(kind)[0] == 0
    if not (whole and info.nbytes == extent[1] - extent[0]):
        _fail(
            f"the tensor {name!r} of shape {shape!r:.60} in {dtype} has the data_offsets {extent}, "
            "which do not fit it",
        )
    return info


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 64 for item in value
    )


class _Damaged(Exception):
    """What is wrong with a file, with the ways out by what it is to be."""

    ways: ClassVar = {
        "safetensors": "this is no well-formed safetensors file, so compare its SHA-256 with the "
        "published one, or save the checkpoint again.",
        "dump": "this is no well-formed safetensors file, so record it again.",
    }


class _CutOff(_Damaged):
    ways: ClassVar = {
        "safetensors": "finish the download, or compare size and SHA-256 with the published ones.",
        "dump": "let who writes it end, or record it again.",
    }


class _OfOtherType(_Damaged):
    ways: ClassVar = {
        "safetensors": "choose a checkpoint in F32, F16 or BF16, or a GGUF file.",
        "dump": "write it as one of these.",
    }


def _fail(problem: str) -> NoReturn:
    raise _Damaged(problem)
