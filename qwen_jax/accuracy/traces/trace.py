"""A trace: the named tensors of one text through one engine, and what there is to know of the run.

The names and their order are those of `names`; the axes of each are in `AXES`, position first.
docs/trace-format.md describes the file for other engines; `foreign` reads what they dump.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from qwen_jax import strict_json
from qwen_jax.accuracy.exact.operands import KINDS
from qwen_jax.accuracy.traces.layout import flat_shape
from qwen_jax.config import ModelConfig, YarnScaling
from qwen_jax.errors import UserError
from qwen_jax.weights.open_files import OpenFile, OpenFiles
from qwen_jax.weights.safetensors import read_with_metadata
from qwen_jax.weights.tensors import TensorInfo

AXES = {
    "embed": "T D",
    "attn_norm": "T D",
    "q_proj": "T N H",
    "k_proj": "T K H",
    "v_proj": "T K H",
    "q_rope": "T N H",
    "k_rope": "T K H",
    "attn_scores": "T N S",
    "attn_probs": "T N S",
    "attn_out": "T (N H)",
    "o_proj": "T D",
    "attn_residual": "T D",
    "ffn_norm": "T D",
    "gate_proj": "T F",
    "up_proj": "T F",
    "ffn_act": "T F",
    "down_proj": "T D",
    "ffn_residual": "T D",
    "final_norm": "T D",
    "logits": "T V",
}
"""Axes of each tensor, in the order of computation; `(N H)` is one axis, heads outermost.

T counts the recorded positions, S = `Header.stop` the keys they may see; of `attn_scores` a
masked place is -inf, of `attn_probs` 0.
"""

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "logits")
"""Products with a matrix of the model."""

OUTER = ("embed", "final_norm", "logits")
"""Tensors there is one of; every layer has one each of the others."""

DTYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float32": np.float32,
        "float64": np.float64,
    }.items()
}
"""Dtypes a tensor of a trace may have: that in which it was computed."""

_STORED = {
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BF16": DTYPES["bfloat16"],
    "BOOL": np.dtype(bool),
}
"""What a dump may hold, by the names of safetensors: ids of tokens and masks, too."""

METADATA = "qwen_jax_trace"
"""The key under which a safetensors file's metadata hold the header, as JSON."""

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Header:
    """What there is to know of a traced run.

    Attributes:
        model: the checkpoint, as its user named it.
        model_sha256: of the GGUF file, where there is one and it was asked for.
        config: the model's sizes and constants, as `config_to_json` writes them.
        implementation: which engine, and which of its implementations.
        dtype: of the parameters, "float32" say; norms and biases may be wider.
        activation_dtype: of what passes between operations.
        matmul_precision: of float32 matrix products: "highest" without TF32, else may differ.
        device: what it ran on.
        versions: of the libraries that computed.
        tokens: the ids of the whole text, prompt and answer.
        start: the first position recorded,
        stop: and the one after the last.
        chunks: how many tokens each call took: the prefill's chunks, then 1 a decode step.
        notes: what a reader should know besides.
        cache_dtype: keys and values are rounded to it before they are attended to; None where
            that is `activation_dtype`.
        operands: of projections, by their tensors' names, what the activation is rounded to for
            that product alone, one of `operands.KINDS`; "float16", or blocks of 8 bits.
        scores_dtype: of attention's scores, whether they are recorded or not; None for float32.
    """

    model: str
    model_sha256: str | None
    config: dict[str, Any]
    implementation: str
    dtype: str
    activation_dtype: str
    matmul_precision: str
    device: str
    versions: dict[str, str]
    tokens: tuple[int, ...]
    start: int
    stop: int
    chunks: tuple[int, ...]
    notes: tuple[str, ...] = ()
    cache_dtype: str | None = None
    operands: dict[str, str] = dataclasses.field(default_factory=dict)
    scores_dtype: str | None = None

    def __post_init__(self) -> None:
        config = self.model_config
        if not self.tokens:
            raise UserError("the trace has no token ids.")
        if not 0 <= min(self.tokens) <= max(self.tokens) < config.vocab_size:
            raise UserError(
                f"tokens go from {min(self.tokens)} to {max(self.tokens)}, but the model has 0 to "
                f"{config.vocab_size - 1}; the text belongs to another model."
            )
        if not 0 <= self.start < self.stop <= len(self.tokens):
            raise UserError(
                f"positions {self.start} to {self.stop} (the last excluded) are not inside the "
                f"text's {len(self.tokens)}."
            )
        if min(self.chunks, default=0) < 1 or sum(self.chunks) != len(self.tokens):
            raise UserError(
                f"chunks are {self.chunks}, but must be positive and add up to the text's "
                f"{len(self.tokens)} tokens."
            )
        optional = ("cache_dtype", "scores_dtype")
        for field in ("dtype", "activation_dtype", *optional):
            if getattr(self, field) not in ((*DTYPES, None) if field in optional else DTYPES):
                raise UserError(
                    f"{field} is {getattr(self, field)!r}, but must be one of {', '.join(DTYPES)}."
                )
        every = set(names(config)) if self.operands else set()
        for name, kind in self.operands.items():
            if name not in every or split_name(name)[1] not in LINEAR or kind not in KINDS:
                raise UserError(
                    f"operands has {name!r}: {kind!r}, but must have projections such as "
                    f"layers.0.q_proj, or logits, and one of {', '.join(KINDS)}."
                )

    @property
    def model_config(self) -> ModelConfig:
        return config_from_json(self.config, self.model)

    def to_json(self) -> str:
        return json.dumps({"version": VERSION} | dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Header":
        """Raises UserError for what is no header, and says which field is wrong."""
        fields = strict_json.parse_object(text, "the header")
        if fields.pop("version", None) != VERSION:
            raise UserError(f"the header is no JSON object of version {VERSION}.")
        known = {field.name for field in dataclasses.fields(cls)}
        for name, absent in (("operands", {}), ("scores_dtype", None)):
            fields.setdefault(name, absent)
        if fields.keys() != known:
            name = min(fields.keys() ^ known)
            problem = "is missing" if name in known else "is unknown"
            raise UserError(f"the header's field {name!r} {problem}.")
        for name in ("tokens", "chunks", "notes"):
            kind = str if name == "notes" else int
            if not isinstance(fields[name], list) or any(type(x) is not kind for x in fields[name]):
                raise UserError(f"the header's {name} must be a list of {kind.__name__}.")
            fields[name] = tuple(fields[name])
        texts = ("model", "implementation", "dtype", "activation_dtype", "matmul_precision")
        wanted = dict.fromkeys((*texts, "device"), str) | {"start": int, "stop": int}
        for name, value_type in (
            wanted | {"config": dict, "versions": dict, "operands": dict}
        ).items():
            if type(fields[name]) is not value_type:
                raise UserError(f"the header's {name} must be of type {value_type.__name__}.")
        if type(fields["model_sha256"]) not in (str, type(None)):
            raise UserError("the header's model_sha256 must be of type str, or null.")
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Trace:
    """A header and tensors by canonical name, in the dtype they were computed in.

    Any subset of the names may be there. Raises UserError where a tensor is unknown, or of a
    shape or dtype it cannot have.
    """

    header: Header
    tensors: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        config, header = self.header.model_config, self.header
        order = names(config)
        unknown = sorted(self.tensors.keys() - set(order))
        if unknown:
            raise UserError(
                f"the tensor {unknown[0]!r} is none of this model's; names are {order[0]}, "
                f"{order[1]}, ... {order[-1]}, with layers 0 to {config.num_layers - 1}."
            )
        if not self.tensors:
            raise UserError("the trace holds no tensor; record it again.")
        for name, tensor in self.tensors.items():
            expected = shape(name, config, header.stop - header.start, header.stop)
            if tensor.shape != expected:
                raise UserError(
                    f"the tensor {name!r} has the shape {tensor.shape}, but {axes(name)} of this "
                    f"model and positions {header.start} to {header.stop} is {expected}."
                )
            if tensor.dtype not in DTYPES.values():
                raise UserError(
                    f"the tensor {name!r} is of dtype {tensor.dtype}, but must be one of "
                    f"{', '.join(DTYPES)}."
                )
        ordered = {name: self.tensors[name] for name in order if name in self.tensors}
        object.__setattr__(self, "tensors", ordered)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, with the header in its metadata.

        Raises:
            UserError: the file cannot be written.
        """
        contiguous = {name: np.ascontiguousarray(x) for name, x in self.tensors.items()}
        part = Path(f"{path}.part")  # a trace is whole or not there
        try:
            save_file(contiguous, str(part), metadata={METADATA: self.header.to_json()})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise UserError(
                f"{path}: the trace can't be written ({error}); make room, or choose a place that "
                "can be written to."
            ) from None


def load(path: str | Path) -> Trace:
    """Reads what `Trace.save` wrote.

    Raises:
        UserError: the file is missing, truncated, no trace, or contradicts its own header.
    """
    path = Path(path)
    metadata, tensors = read_safetensors(path)
    if METADATA not in metadata:
        raise UserError(
            f"{path}: the file's metadata have no {METADATA!r}, so it is no trace of qwen_jax; "
            "describe it by a mapping file (docs/trace-format.md)."
        )
    try:
        return Trace(Header.from_json(metadata[METADATA]), tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """A safetensors file's metadata and tensors, all of one open file.

    Raises UserError where it is damaged, has a tensor of a type that NumPy has not, or is written
    to meanwhile.
    """
    opened = OpenFiles()
    metadata, infos = read_with_metadata(path, opened, "dump")
    tensors = {name: _read(info, opened[path]) for name, info in infos.items()}
    opened.check()
    return metadata, tensors


def _read(info: TensorInfo, file: OpenFile) -> np.ndarray:
    dtype = _STORED.get(info.type.name)
    if dtype is None:
        raise UserError(
            f"{info.path}: the tensor {info.name!r:.80} is of type {info.type.name}, and only "
            f"{', '.join(_STORED)} can be read; write it as one of these."
        )
    values = file.bytes(info.offset, info.offset + info.nbytes).copy()
    return values.view(dtype).reshape(info.shape)


def names(config: ModelConfig) -> list[str]:
    """Every canonical name of a model, in the order of computation."""
    inner = [name for name in AXES if name not in OUTER]
    layers = [f"layers.{i}.{name}" for i in range(config.num_layers) for name in inner]
    return ["embed", *layers, "final_norm", "logits"]


def select(config: ModelConfig, patterns: str | Sequence[str]) -> list[str]:
    """The names that match any of the globs; `*` also crosses dots.

    Args:
        patterns: globs, one by one or with commas between.

    Raises:
        UserError: a glob matches nothing.
    """
    globs = patterns.split(",") if isinstance(patterns, str) else list(patterns)
    every = names(config)
    chosen: set[str] = set()
    for glob in globs:
        found = {name for name in every if fnmatchcase(name, glob.strip())}
        if not found:
            raise UserError(
                f"The tensor name {glob.strip()!r} matches none of the model's, such as "
                f"{every[0]}, layers.0.q_proj, {every[-1]}."
            )
        chosen |= found
    return [name for name in every if name in chosen]


def split_name(name: str) -> tuple[int | None, str]:
    """`layers.3.q_proj` to (3, "q_proj"); a name without layer to (None, name)."""
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def axes(name: str) -> str:
    """The axes of a tensor, as in `AXES`."""
    return AXES[split_name(name)[1]]


def shape(name: str, config: ModelConfig, rows: int, keys: int) -> tuple[int, ...]:
    """The shape of a tensor.

    Args:
        rows: positions recorded.
        keys: positions they may see, `Header.stop`.
    """
    return flat_shape(axes(name), axis_sizes(config) | {"T": rows, "S": keys})


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The axes that belong to the model, by letter."""
    return {
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "G": config.group_size,
        "H": config.head_dim,
        "D": config.hidden_size,
        "F": config.ffn_size,
        "V": config.vocab_size,
    }


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Sizes and constants; the file they came from is the header's `model`."""
    fields = dataclasses.asdict(config)
    del fields["source"]
    return fields


def config_from_json(fields: Mapping[str, Any], source: str) -> ModelConfig:
    """Raises UserError for fields that are missing, unknown or impossible."""
    try:
        yarn = YarnScaling(**fields["yarn"]) if fields.get("yarn") else None
        return ModelConfig(**(dict(fields) | {"yarn": yarn, "source": source}))
    except TypeError as error:
        raise UserError(f"the header's config does not describe a model ({error}).") from None
