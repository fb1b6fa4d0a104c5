"""What another engine dumped, read as a trace through a mapping file (docs/trace-format.md)."""

import dataclasses
import functools
import tokenize
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from qwen_jax import regular_files, strict_json
from qwen_jax.accuracy.traces.collecting import Collector
from qwen_jax.accuracy.traces.layout import rearrange
from qwen_jax.accuracy.traces.trace import (
    DTYPES,
    METADATA,
    OUTER,
    VERSION,
    Header,
    Trace,
    axes,
    axis_sizes,
    config_to_json,
    load,
    names,
    read_safetensors,
    split_name,
)
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

MAPPING = "mapping.json"

HEADER_KEYS = {
    "implementation": str,
    "dtype": str,
    "activation_dtype": str,
    "cache_dtype": str,
    "matmul_precision": str,
    "device": str,
    "versions": dict,
    "notes": list,
    "tokens": list,
    "start": int,
    "stop": int,
    "chunks": list,
    "operands": dict,
    "scores_dtype": str,
}
"""Keys of a mapping that are a header's fields, and their JSON types."""

TENSOR_KEYS = {"from": (str, list), "axes": str, "join": int, "dtype": str, "masked": (int, float)}

MOST_PIECES, LONGEST_NAME = 256, 1000
"""Of one tensor: a mapping must not become much larger than its file."""

_DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
)
"""What NumPy raises for an .npy file whose header or content is not one."""

Arrays = Mapping[str, Callable[[], np.ndarray]]
"""Every dumped array by name, read when it is needed."""


def open_trace(
    path: str | Path,
    config: ModelConfig,
    *,
    tokens: Sequence[int] | None = None,
    mapping: str | Path | None = None,
) -> Trace:
    """A trace of this model, written by this engine or by another.

    Args:
        path: a safetensors file, a directory of .npy or safetensors files, or its mapping file.
        config: the model that the trace must be of.
        tokens: the text that it must be of, where known.
        mapping: what the dumped names mean. By default `mapping.json` in the directory, or
            `x.mapping.json` beside `x.safetensors`; a trace of qwen_jax needs none.

    Raises:
        UserError: the trace is missing, truncated, or of another model or text.
    """
    path = dump_of(path)
    found = mapping_of(path, mapping)
    trace = load(path) if found is None else _read_foreign(path, found, config, tokens)
    _check_same_model(trace.header.model_config, config, path)
    if tokens is not None and trace.header.tokens != tuple(tokens):
        theirs, ours = trace.header.tokens, tuple(tokens)
        common = min(len(theirs), len(ours))
        first = next((i for i in range(common) if theirs[i] != ours[i]), common)
        raise UserError(
            f"{path}: the trace is of {len(theirs)} tokens, which differ from the {len(ours)} "
            f"given from position {first} on; trace the same text."
        )
    return trace


def dump_of(path: str | Path) -> Path:
    """The dump that a mapping file belongs to, where one is named; else what is named."""
    path = Path(path)
    if path.name == MAPPING:
        return path.parent
    if path.name.endswith("." + MAPPING):
        return path.with_name(path.name.removesuffix("." + MAPPING) + ".safetensors")
    return path


def mapping_of(path: Path, mapping: str | Path | None = None) -> Path | None:
    """What says what the names in a dump mean; None for a trace of ours, which needs nothing.

    Raises UserError where there is no trace, or nothing that says it.
    """
    path = dump_of(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such file or directory; check the path.")
    if mapping is None and path.is_file() and METADATA in read_safetensors(path)[0]:
        return None
    return _find_mapping(path, mapping)


def _check_same_model(theirs: ModelConfig, ours: ModelConfig, path: Path) -> None:
    for field in dataclasses.fields(ModelConfig):
        if field.name in ("source", "context_length"):
            continue
        a, b = getattr(theirs, field.name), getattr(ours, field.name)
        # One and the same 1e-6 is a float32 in a GGUF file and a float64 in a config.json.
        same = np.float32(a) == np.float32(b) if isinstance(b, float) else a == b
        if not same:
            raise UserError(
                f"{path}: the trace's model has {field.name} {a}, but {ours.source} has {b}; trace "
                "the same model."
            )


def _find_mapping(path: Path, mapping: str | Path | None) -> Path:
    if mapping is not None:
        return Path(mapping)
    found = path / MAPPING if path.is_dir() else path.with_suffix("." + MAPPING)
    if not found.exists():
        raise UserError(
            f"{path}: this is no trace of qwen_jax, and {found} is not there to say what the names "
            "in it mean; write one (docs/trace-format.md)."
        )
    return found


def _read_foreign(
    path: Path, mapping: Path, config: ModelConfig, tokens: Sequence[int] | None
) -> Trace:
    fields = strict_json.read_object(mapping)
    arrays = _arrays(path)
    try:
        if fields.pop("version", None) != VERSION:
            raise UserError(f'it is no JSON object with "version": {VERSION}.')
        _check_keys(fields, HEADER_KEYS | {"layers": list, "tensors": dict}, "")
        header = _header(fields, config, tokens)
        layers = _layers(fields, config)
        wanted = fields.get("tensors") or {name: name for name in arrays}
        specs = _expand(wanted, layers, config)
        tensors = {name: _tensor(name, spec, arrays, header, path) for name, spec in specs.items()}
        return Trace(header, tensors)
    except UserError as error:
        raise UserError(f"{mapping}: {error}") from None


def _check_keys(fields: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for key, value in fields.items():
        if key not in known:
            raise UserError(f"{where}the key {key!r} is unknown; keys are {', '.join(known)}.")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            raise UserError(f"{where}the key {key!r} holds {value!r}, which is of the wrong type.")


def _header(fields: Mapping[str, Any], config: ModelConfig, tokens: Sequence[int] | None) -> Header:
    text = fields.get("tokens", tokens)
    if text is None:
        raise UserError('the text is not known; give its ids as "tokens", or on the command line.')
    for key, values in (("tokens", text), ("chunks", fields.get("chunks", []))):
        if any(type(value) is not int for value in values):
            raise UserError(f"the key {key!r} must be a list of integers.")
    if "dtype" not in fields:
        raise UserError(f'the key "dtype", that of the weights, is missing: {", ".join(DTYPES)}.')
    return Header(
        model=config.source,
        model_sha256=None,
        config=config_to_json(config),
        implementation=fields.get("implementation", "another engine"),
        dtype=fields["dtype"],
        activation_dtype=fields.get("activation_dtype", fields["dtype"]),
        cache_dtype=fields.get("cache_dtype"),
        matmul_precision=fields.get("matmul_precision", "highest"),
        device=fields.get("device", "unknown"),
        versions={str(k): str(v) for k, v in fields.get("versions", {}).items()},
        tokens=tuple(text),
        start=fields.get("start", 0),
        stop=fields.get("stop", len(text)),
        chunks=tuple(fields.get("chunks", [len(text)])),
        notes=tuple(str(note) for note in fields.get("notes", [])),
        scores_dtype=fields.get("scores_dtype"),
        operands={
            name.replace("{i}", str(layer)): kind
            for name, kind in fields.get("operands", {}).items()
            for layer in (_layers(fields, config) if "{i}" in name else (None,))
        },
    )


def _layers(fields: Mapping[str, Any], config: ModelConfig) -> list[int]:
    """The numbers that "{i}" stands for, each once."""
    layers: list[int] = fields.get("layers", list(range(config.num_layers)))
    if any(type(layer) is not int or not 0 <= layer < config.num_layers for layer in layers):
        raise UserError(f'the key "layers" must hold numbers from 0 to {config.num_layers - 1}.')
    return list(dict.fromkeys(layers))


def _expand(
    wanted: Mapping[str, Any], layers: Sequence[int], config: ModelConfig
) -> dict[str, dict[str, Any]]:
    """One entry for every canonical name, with the layer's number filled in."""
    every = set(names(config))
    out: dict[str, dict[str, Any]] = {}
    for pattern, spec in wanted.items():
        spec = {"from": spec} if isinstance(spec, str | list) else spec
        if not isinstance(spec, dict) or "from" not in spec:
            raise UserError(f'the tensor {pattern!r} needs a name, or an object with "from".')
        _check_keys(spec, TENSOR_KEYS, f"of the tensor {pattern!r}, ")
        sources = spec["from"] if isinstance(spec["from"], list) else [spec["from"]]
        if not sources or any(not isinstance(source, str) for source in sources):
            raise UserError(f'"from" of the tensor {pattern!r} must be names.')
        if len(sources) > MOST_PIECES or max(map(len, sources)) > LONGEST_NAME:
            raise UserError(
                f'"from" of the tensor {pattern!r} has {len(sources)} names, the longest of '
                f"{max(map(len, sources))} letters, but it may have {MOST_PIECES} of "
                f"{LONGEST_NAME}; join pieces before they are dumped."
            )
        for layer in layers if "{i}" in pattern else (None,):
            name = pattern.replace("{i}", str(layer))
            if name not in every:
                raise UserError(
                    f"the tensor {name!r} is none of this model's, of {config.num_layers} layers; "
                    f"names are {', '.join(OUTER)} and layers.{{i}}.q_proj and so on."
                )
            filled = [source.replace("{i}", str(layer)) for source in sources]
            out[name] = spec | {"from": filled}
    return out


def _tensor(
    name: str, spec: Mapping[str, Any], arrays: Arrays, header: Header, path: Path
) -> np.ndarray:
    """One canonical tensor, put together from the calls it was dumped in."""
    config, kind = header.model_config, split_name(name)[1]
    by_call = any("{c}" in source for source in spec["from"])
    if by_call and (header.start, header.stop) != (0, len(header.tokens)):
        raise UserError(f"{name!r} is dumped call by call, which needs every position.")
    collector = Collector(header, [name])
    position = header.start
    for call, length in enumerate(header.chunks if by_call else [header.stop - header.start]):
        sources = [source.replace("{c}", str(call)) for source in spec["from"]]
        sizes = axis_sizes(config) | {"T": length, "S": position + length}
        try:
            pieces = [_typed(_read(source, arrays), spec, header, kind) for source in sources]
            joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, spec.get("join", -1))
            part = rearrange(joined, spec.get("axes", axes(name)), axes(name), sizes)
        except UserError as error:
            raise UserError(f"{name!r} from {', '.join(sources)!r} in {path} {error}") from None
        except ValueError as error:  # of np.concatenate
            raise UserError(f"{name!r}: {', '.join(sources)} cannot be joined: {error}.") from None
        if kind == "attn_scores" and "masked" in spec:
            with np.errstate(over="ignore"):  # -1e9 is -inf in float16
                part = np.where(part <= spec["masked"], part.dtype.type(-np.inf), part)
        collector.add(name, position, part)
        position += length
    return collector.trace().tensors[name]


def _typed(array: np.ndarray, spec: Mapping[str, Any], header: Header, kind: str) -> np.ndarray:
    """In the dtype it was computed in, where it was stored as bits or in a wider one.

    Scores should be float32 beside narrower activations. Where they happen to fit these, nobody
    has said that they are no better, and it is a fault.
    """
    told = spec.get("dtype")
    if told is not None and told not in DTYPES:
        raise UserError(f'"dtype" is {told!r}, but must be one of {", ".join(DTYPES)}.')
    dtype = DTYPES[told or header.activation_dtype]
    if array.dtype in (np.uint16, np.int16) or array.dtype.kind == "V":
        if array.dtype.itemsize != dtype.itemsize:
            raise UserError(f'holds {array.dtype} bits, which are no {dtype}; tell their "dtype".')
        return array.view(dtype)
    if array.dtype not in DTYPES.values():
        raise UserError(f"is of dtype {array.dtype}, but must be one of {', '.join(DTYPES)}.")
    if array.dtype.itemsize > dtype.itemsize and (told or kind != "attn_scores"):
        with np.errstate(over="ignore"):
            narrow = array.astype(dtype)
        if np.array_equal(narrow.astype(array.dtype), array, equal_nan=True):
            return narrow
    if told is not None and array.dtype != dtype:
        raise UserError(f'holds values that are no {told}; leave "dtype" out, or dump it so.')
    return array


def _read(name: str, arrays: Arrays) -> np.ndarray:
    if name not in arrays:
        some = ", ".join(sorted(arrays)[:3])
        raise UserError(f"is not there: the {len(arrays)} arrays are {some}, ...")
    return arrays[name]()


def _arrays(path: Path) -> Arrays:
    """Every array of a file or directory; an .npy file's name is its path without the suffix."""
    arrays: dict[str, Callable[[], np.ndarray]] = {}
    files = dump_files(path)
    for file in files:
        if file.suffix == ".npy":
            name = file.relative_to(path).with_suffix("").as_posix() if path.is_dir() else file.stem
            arrays[name] = functools.partial(_read_npy, file)
        else:
            tensors = read_safetensors(file)[1]
            arrays |= {name: functools.partial(tensors.__getitem__, name) for name in tensors}
    if not files:
        raise UserError(f"{path}: there is no .npy or safetensors file in it; check the path.")
    if not arrays:
        raise UserError(f"{path}: there is no tensor in it; record it again.")
    return arrays


def dump_files(path: Path) -> list[Path]:
    """The files of a dump that hold arrays."""
    if path.is_file():
        return [path]
    return sorted(f for f in path.rglob("*") if f.suffix in (".npy", ".safetensors"))


def _read_npy(path: Path) -> Shaped[np.ndarray, "..."]:
    try:
        with regular_files.opened(path) as file:
            array = np.load(file, allow_pickle=False)
    except _DAMAGED as error:
        raise UserError(f"{path}: the file is no .npy file, or truncated ({error}).") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: the file holds several arrays; write one .npy file each.")
    return array
