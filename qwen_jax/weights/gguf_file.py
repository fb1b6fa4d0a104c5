"""A bounded, memory-mapped reader of GGUF files, whole or split.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file is a header (magic,
version, counts), key-value pairs, tensor descriptions and, from the next multiple of the
alignment, the tensors' bytes. Nothing in a file is trusted: whatever it claims, reading it ends
in a `GGUFFile` or in one UserError, within memory bounded by `MAX_HEADER_BYTES`.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qwen_jax.errors import UserError
from qwen_jax.file_kinds import told_by_kind
from qwen_jax.regular_files import is_there
from qwen_jax.weights.gguf_cursor import NOT_WELL_FORMED, Cursor
from qwen_jax.weights.open_files import OpenFiles
from qwen_jax.weights.tensors import TensorFiles, TensorInfo

MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63  # GGML's GGML_MAX_NAME counts the null at its end
# llama.cpp counts on from 42; ik_llama.cpp, a fork, has numbers of its own up to 398.
MAX_TYPE = 1023
DEFAULT_ALIGNMENT = 32

# Types that llama.cpp wrote once and has removed. Rows of the last six were interleaved for one
# processor each.
REMOVED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

_SMALLEST_PAIR = 13
_SMALLEST_TENSOR = 32

SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class GGUFFile(TensorFiles):
    """An open GGUF checkpoint; of a split one, all parts as if they were one file."""

    version: int


def open_gguf(path: str | Path, opened: OpenFiles | None = None) -> GGUFFile:
    """Opens a GGUF file, or a split checkpoint by any of its parts, in `opened` if that is given.

    Raises UserError, naming file and field, for anything but well-formed little-endian GGUF
    version 2 or 3.
    """
    path, opened = Path(path), OpenFiles() if opened is None else opened
    paths = split_paths(path)
    if not path.is_file():
        _check_all_there(path, paths)
    part = _read_part(path, opened)
    count = _integer(path, part.metadata, "split.count", default=1)
    if count <= 1:
        return part
    if len(paths) != count:
        raise UserError(
            f"{path}: split.count is {count}, but the name does not end in "
            f"-0000N-of-{count:05d}.gguf; give the parts the names they were published under."
        )
    _check_all_there(path, paths)
    return _join([part if other == path else _read_part(other, opened) for other in paths])


def _check_all_there(path: Path, parts: list[Path]) -> None:
    missing = [part.name for part in parts if not is_there(part)]
    if 0 < len(missing) < len(parts):
        raise UserError(
            f"{path}: of the {len(parts)} parts of this split checkpoint, {len(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); download all parts into one directory."
        )


def split_paths(path: Path) -> list[Path]:
    """The parts of the split checkpoint that `path` is one of, by name; `[path]` if it is none."""
    name = SPLIT_NAME.fullmatch(path.name)
    if not name:
        return [path]
    count = int(name["count"])
    return [
        path.with_name(f"{name['stem']}-{part:05d}-of-{count:05d}.gguf")
        for part in range(1, count + 1)
    ]


def _join(parts: list[GGUFFile]) -> GGUFFile:
    """Parts in the order of their names as one file; the first one's metadata count."""
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        (path,) = part.paths
        for key, expected in (("split.no", number), ("split.count", len(parts))):
            found = _integer(path, part.metadata, key)
            if found != expected:
                raise UserError(
                    f"{path}: {key} is {found}, but its name says {expected}; the parts are mixed "
                    "up, so give them the names they were published under."
                )
        for name, info in part.tensors.items():
            if name in tensors:
                raise UserError(
                    f"{path}: the tensor {name!r} is already in {tensors[name].path.name}; the "
                    "parts are not of one checkpoint, so take all of them from one place."
                )
            tensors[name] = info
    (first,) = parts[0].paths
    total = _integer(first, parts[0].metadata, "split.tensors.count")
    if total != len(tensors):
        raise UserError(
            f"{first}: split.tensors.count is {total}, but the {len(parts)} parts hold "
            f"{len(tensors)} tensors; they are not of one checkpoint, so take all from one place."
        )
    paths = tuple(path for part in parts for path in part.paths)
    return dataclasses.replace(parts[0], paths=paths, tensors=tensors)


def _read_part(path: Path, opened: OpenFiles) -> GGUFFile:
    with told_by_kind(path, "GGUF"):
        return _parse(path, opened)


def _parse(path: Path, opened: OpenFiles) -> GGUFFile:
    data = opened[path].map
    cursor = Cursor(path, data)
    version, num_tensors, num_pairs = _read_header(cursor)
    metadata: dict[str, Any] = {}
    for index in range(num_pairs):
        key = cursor.name(f"key {index}")
        if key in metadata:
            cursor.fail(f"the key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.value_type(f"the key {key!r}"), f"the key {key!r}")
    alignment = _integer(path, metadata, "general.alignment", default=DEFAULT_ALIGNMENT)
    if alignment < 1 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment}, which is no power of two")
    tensors: dict[str, TensorInfo] = {}
    end = 0  # of the tensors so far, counted from the start of their bytes
    for index in range(num_tensors):
        info = _read_tensor(cursor, index, alignment, end)
        if info.name in tensors:
            cursor.fail(f"the tensor {info.name!r} appears twice")
        tensors[info.name] = info
        end += _padded(info.nbytes, alignment)
    start = _padded(cursor.at, alignment)
    tensors = {
        name: dataclasses.replace(info, offset=start + info.offset)
        for name, info in tensors.items()
    }
    # As in llama.cpp the last tensor need not be padded, and bytes after it are nobody's.
    for info in tensors.values():
        if info.offset + info.nbytes > len(data):
            raise UserError(
                f"{path}: the tensor {info.name!r} ends at byte {info.offset + info.nbytes}, but "
                f"the file has only {len(data)}; finish the download, or compare the size with the "
                "published one."
            )
    return GGUFFile((path,), metadata, tensors, version, opened=opened)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _read_header(cursor: Cursor) -> tuple[int, int, int]:
    """Version, number of tensors, number of key-value pairs."""
    magic = cursor.magic()
    if magic != b"GGUF":
        raise UserError(
            f"{cursor.path}: the file begins with {magic!r}, and a GGUF file begins with b'GGUF'; "
            "choose another file."
        )
    version = cursor.number("<I", "the version")
    if version & 0xFFFF == 0:
        raise UserError(
            f"{cursor.path}: the file is big-endian; convert it with gguf-convert-endian, or "
            "download the little-endian one."
        )
    if version not in (2, 3):
        raise UserError(
            f"{cursor.path}: the GGUF version is {version}, and only 2 and 3 are supported; "
            "choose a file of one of them, or convert the checkpoint again."
        )
    num_tensors = cursor.count("the number of tensors", _SMALLEST_TENSOR)
    num_pairs = cursor.count("the number of keys", _SMALLEST_PAIR)
    return version, num_tensors, num_pairs


def _read_tensor(cursor: Cursor, index: int, alignment: int, expected: int) -> TensorInfo:
    """One description; its offset, still from the start of the tensors' bytes, is `expected`.

    llama.cpp demands that each tensor begins where the padded sizes before it add up to
    (gguf_init_from_reader in gguf.cpp), so neither gaps nor another order are GGUF.
    """
    name = cursor.name(f"tensor {index}")
    if (size := len(name.encode())) > MAX_NAME_BYTES:
        cursor.fail(f"tensor {index} has a name of {size} bytes, above {MAX_NAME_BYTES}")
    field = f"the tensor {name!r}"
    dimensions = cursor.number("<I", f"{field}: the number of dimensions")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        cursor.fail(f"{field} has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
    # The file lists the fastest-varying dimension first.
    shape = tuple(cursor.number("<Q", f"{field}: a dimension") for _ in range(dimensions))[::-1]
    if 0 in shape:
        cursor.fail(f"{field} has the shape {shape}, which is empty")
    if math.prod(shape) >= 1 << 63:
        cursor.fail(f"{field} has the shape {shape}, which no file can hold")
    code = cursor.number("<I", f"{field}: the type")
    offset = cursor.number("<Q", f"{field}: the offset")
    if offset != expected:
        cursor.fail(
            f"{field} has the offset {offset}, but the sizes of the tensors before it, padded to "
            f"the alignment {alignment}, add up to {expected}"
        )
    kind = _tensor_type(cursor, field, code)
    block, _ = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        cursor.fail(
            f"{field} has rows of {shape[-1]} values, no multiple of {kind.name}'s blocks of "
            f"{block}"
        )
    return TensorInfo(name, shape, kind, cursor.path, offset)


def _tensor_type(cursor: Cursor, field: str, code: int) -> GGMLQuantizationType:
    if code in REMOVED_TYPES:
        raise UserError(
            f"{cursor.path}: {field} is of type {code}, {REMOVED_TYPES[code]}, which llama.cpp has "
            "removed; choose a file in Q4_0 or Q4_K_M, or quantise the model again."
        )
    try:
        return GGMLQuantizationType(code)
    except ValueError:
        if code <= MAX_TYPE:
            raise UserError(
                f"{cursor.path}: {field} is of type {code}, which is newer than this engine knows, "
                "or a fork's; choose a file in another quantisation, such as Q4_K_M or Q8_0."
            ) from None
        cursor.fail(f"{field} has the type {code}, which no program has given out")


def _integer(path: Path, metadata: dict[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(
            f"{path}: the key {key!r} holds {value!r:.60}, not an integer; {NOT_WELL_FORMED}."
        )
    return value
