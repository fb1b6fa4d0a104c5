"""A bounded reader of Hugging Face directories: config.json and safetensors, sharded or not.

The format: https://huggingface.co/docs/safetensors. A file is the length of a JSON header, the
header and the tensors' bytes. The reader trusts nothing: see `gguf_file`.
"""

import math
import struct
from pathlib import Path
from typing import Any, TypeGuard

from gguf.constants import GGMLQuantizationType

from qwen_jax.errors import UserError
from qwen_jax.strict_json import parse_object, read_object
from qwen_jax.weights.tensors import (
    OtherType,
    TensorFiles,
    TensorInfo,
    TensorType,
    check_extents,
    map_file,
)

# The header of a 72B shard has 100 kB; the bound also caps what parsing it can take.
MAX_JSON_BYTES = 16 << 20

_TYPES: dict[str, TensorType] = {
    **{name: GGMLQuantizationType[name] for name in ("F64", "F32", "F16", "BF16")},
    **{name: GGMLQuantizationType[name] for name in ("I64", "I32", "I16", "I8")},
    **OtherType.__members__,
}


class SafetensorsDirectory(TensorFiles):
    """An open Hugging Face checkpoint; `metadata` is its config.json."""


def open_safetensors(directory: str | Path) -> SafetensorsDirectory:
    """Opens a directory with config.json and model.safetensors, or an index of shards.

    Raises UserError, naming file and field, for anything else.
    """
    directory = Path(directory)
    config = read_object(directory / "config.json", allow_nan=True)
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return SafetensorsDirectory((single,), config, _read_shard(single))
    if not index.exists():
        raise UserError(
            f"{directory}: the directory has neither {single.name} nor {index.name}; download the "
            "safetensors files of the checkpoint, or convert it to them."
        )
    shards = _shards(index)
    missing = sorted(shard.name for shard in shards if not shard.exists())
    if missing:
        raise UserError(
            f"{index}: of the {len(shards)} shards, {len(missing)} are missing "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); download them too."
        )
    tensors: dict[str, TensorInfo] = {}
    for shard, listed in shards.items():
        found = _read_shard(shard)
        astray = sorted(found.keys() ^ listed)
        if astray:
            raise UserError(
                f"{shard}: the tensor {astray[0]!r} is in only one of this shard and "
                f"{index.name}; they do not belong together, so download them again."
            )
        tensors |= found
    return SafetensorsDirectory(tuple(shards), config, tensors)


def _shards(index: Path) -> dict[Path, set[str]]:
    """Which tensors the index places in which shard; each tensor is in one, as a JSON key."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is missing or empty; download the file again.")
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        plain = isinstance(file, str) and Path(file).name == file and file.isprintable()
        if not (plain and file.endswith(".safetensors")):
            raise UserError(
                f"{index}: the tensor {name!r} is in {file!r}, which is no safetensors file here; "
                "download the file again."
            )
        shards.setdefault(index.with_name(file), set()).add(name)
    return dict(sorted(shards.items()))


def _read_shard(path: Path) -> dict[str, TensorInfo]:
    data = map_file(path)
    start = 8 + (struct.unpack_from("<Q", data)[0] if len(data) >= 8 else 0)
    if not 8 < start <= min(len(data), MAX_JSON_BYTES):
        raise UserError(
            f"{path}: the header claims to end at byte {start}, but the file has {len(data)} and "
            f"a header at most {MAX_JSON_BYTES}; it is no safetensors file, or damaged."
        )
    header = parse_object(data[8:start], str(path))
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, path, start) for name, entry in header.items()}
    check_extents(tensors.values(), path, len(data))
    return tensors


def _tensor(name: str, entry: Any, path: Path, start: int) -> TensorInfo:
    def fail(problem: str) -> UserError:
        return UserError(f"{path}: the tensor {name!r} {problem}.")

    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, extent = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    kind = _TYPES.get(dtype) if isinstance(dtype, str) else None
    if kind is None:
        raise fail(
            f"has the dtype {dtype!r}, and only {', '.join(_TYPES)} are known; choose a "
            "checkpoint in F32, F16 or BF16, or a GGUF file"
        )
    if not _naturals(shape) or 0 in shape:
        raise fail(f"has the shape {shape!r}, not a list of positive integers; it is damaged")
    if not _naturals(extent) or len(extent) != 2:
        raise fail(f"has the data_offsets {extent!r}, not two integers; it is damaged")
    info = TensorInfo(name, tuple(shape), kind, path, start + extent[0])
    if math.prod(shape) >= 1 << 63 or info.nbytes != extent[1] - extent[0]:
        raise fail(
            f"of shape {shape} in {dtype} has the data_offsets {extent}, which do not fit it; it "
            "is damaged"
        )
    return info


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
