"""How the matrices of a Hugging Face directory are quantised, as its config says.

The config is `quantization_config` in config.json, or the file that AutoGPTQ and AutoAWQ wrote
before there was one. Whether a matrix is quantised at all is seen by its tensors, since checkpoints
leave out modules by several lists and patterns.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.strict_json import read_object
from qwen_jax.weights import float8
from qwen_jax.weights.float8 import Float8
from qwen_jax.weights.integers import Awq, Gptq
from qwen_jax.weights.stored import Plain, Stored
from qwen_jax.weights.tensors import TensorFiles

_FIELDS = ("quantization_config", "compression_config")
"""Fields of config.json; llm-compressor wrote the second once, where vLLM looks for it too."""

_OLDER = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files from before `quantization_config`, and the method each is of."""

_PARTS = (".qweight", *(f".{scale}" for scale in float8.SCALES))
"""Ends of the names of tensors that quantised weights alone have."""

_DEFAULT_BLOCK = (128, 128)
"""Of FP8 where the config is silent, as in transformers."""

_INSTEAD = "choose a GPTQ, AWQ or FP8 checkpoint, the unquantised one, or a GGUF file"


class Quantization(Protocol):
    """Says how a checkpoint's files hold a weight."""

    def stored(self, files: TensorFiles, name: str, shape: tuple[int, ...]) -> Stored:
        """The weight of this name and shape; its tensors need not be there."""

    @property
    def not_needed(self) -> tuple[str, ...]:
        """Ends of the names of tensors that say nothing of the weights."""


@dataclasses.dataclass(frozen=True)
class Unquantised:
    """Every weight is one tensor."""

    not_needed: tuple[str, ...] = ()

    def stored(self, files: TensorFiles, name: str, shape: tuple[int, ...]) -> Stored:
        return Plain(files, name, shape)


@dataclasses.dataclass(frozen=True)
class GptqModules:
    """GPTQ, each module by the settings that a pattern of `dynamic` gives it, or the general ones.

    Attributes:
        dynamic: regular expressions of GPTQModel, with "+:" before them or not, to settings.
    """

    bits: int
    group_size: int
    ordered: bool
    zeros_less_one: bool
    source: str
    dynamic: Mapping[str, Mapping[str, Any]]
    not_needed: tuple[str, ...] = ()

    def stored(self, files: TensorFiles, name: str, shape: tuple[int, ...]) -> Stored:
        module = name.removesuffix(".weight")
        if not _is_packed(files, name, shape):
            return Plain(files, name, shape)
        own = self.of(module)
        ordered = f"{module}.g_idx" in files.tensors or own.ordered
        less_one = self.zeros_less_one
        return Gptq(files, module, shape, own.bits, own.group_size, less_one, ordered)

    def of(self, module: str) -> "GptqModules":
        for pattern, changes in self.dynamic.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                settings = _Settings({**changes}, f"{self.source}, dynamic[{pattern!r}]")
                return dataclasses.replace(
                    self,
                    bits=_bits(settings, self.bits, (2, 3, 4, 8)),
                    group_size=_group_size(settings, self.group_size),
                    ordered=settings.get("desc_act", bool, self.ordered),
                )
        return self


@dataclasses.dataclass(frozen=True)
class AwqModules:
    bits: int
    group_size: int
    not_needed: tuple[str, ...] = ()

    def stored(self, files: TensorFiles, name: str, shape: tuple[int, ...]) -> Stored:
        if not _is_packed(files, name, shape):
            return Plain(files, name, shape)
        return Awq(files, name.removesuffix(".weight"), shape, self.bits, self.group_size)


@dataclasses.dataclass(frozen=True)
class Float8Modules:
    """FP8.

    Attributes:
        block: rows and columns of a block, None where a scale is of a row or a matrix.
        certain: whether the config says so; else the scales' own shape decides.
    """

    block: tuple[int, int] | None
    certain: bool = True
    not_needed: tuple[str, ...] = float8.NOT_NEEDED

    def stored(self, files: TensorFiles, name: str, shape: tuple[int, ...]) -> Stored:
        if len(shape) != 2 or not float8.is_float8(files, name):
            return Plain(files, name, shape)
        module = name.removesuffix(".weight")
        names = [f"{module}.{scale}" for scale in float8.SCALES]
        scale = next((scale for scale in names if scale in files.tensors), names[0])
        found = files.tensors[scale].shape if scale in files.tensors else None
        whole = not self.certain and found in float8.whole_shapes(shape[0])
        return Float8(files, name, shape, scale, None if whole else self.block)


def _is_packed(files: TensorFiles, name: str, shape: tuple[int, ...]) -> bool:
    """Whether the weight is a matrix that is not there as it is, but packed."""
    packed = f"{name.removesuffix('.weight')}.qweight"
    return len(shape) == 2 and name not in files.tensors and packed in files.tensors


def read_quantization(files: TensorFiles, directory: Path) -> Quantization:
    """What the directory's config says. Raises UserError, naming file, field and value."""
    settings = _settings(files, directory)
    if settings is None:
        if packed := next(
            (info for name, info in files.tensors.items() if name.endswith(_PARTS)), None
        ):
            raise UserError(
                f"{directory}: the tensor {packed.name!r} is of a quantised weight, but "
                "config.json has no quantization_config, which says how to read it; get the "
                "original config.json."
            )
        return Unquantised()
    method = settings.get("quant_method", str).lower()
    if method not in _METHODS:
        raise settings.refuse("quant_method", f"only {', '.join(_METHODS)} are read; {_INSTEAD}")
    return _METHODS[method](settings)


_KINDS = {
    bool: "true or false",
    dict: "a mapping",
    int: "a whole number",
    list: "a list",
    str: "text",
}


@dataclasses.dataclass(frozen=True)
class _Settings:
    """A mapping of the config; `source` says which."""

    fields: dict[str, Any]
    source: str

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """The value, checked to be of its kind; without a default it must be there."""
        value = self.fields.get(key)
        if value is None and default:
            return default[0]
        if type(value) is not kind:
            raise self.refuse(key, f"it must be {_KINDS[kind]}; get the original file")
        return value

    def refuse(self, key: str, why: str) -> UserError:
        given = f"is {self.fields[key]!r:.80}" if key in self.fields else "is missing"
        return UserError(f"{self.source}: {key} {given}, and {why}.")


def _settings(files: TensorFiles, directory: Path) -> _Settings | None:
    for field in _FIELDS:
        config, source = files.metadata.get(field), f"{directory / 'config.json'}, {field}"
        if isinstance(config, dict):
            return _Settings(config, source)
        if config is not None:
            raise UserError(f"{source} is {config!r:.80}, but it must be a mapping; {_INSTEAD}.")
    for name, method in _OLDER.items():
        if (path := directory / name).exists():
            return _Settings({"quant_method": method} | read_object(path), str(path))
    return None


def _gptq(settings: _Settings) -> Quantization:
    forms = set()
    for key in ("checkpoint_format", "format"):
        if (form := settings.get(key, str, "").lower()) not in ("", "gptq", "gptq_v2"):
            raise settings.refuse(key, f"only gptq and gptq_v2 are read; {_INSTEAD}")
        forms |= {form} - {""}
    if len(forms) > 1:
        raise settings.refuse("format", "checkpoint_format is another; keep the right one")
    if settings.get("is_marlin_format", bool, False):
        raise settings.refuse("is_marlin_format", f"only plain GPTQ is read; {_INSTEAD}")
    if settings.fields.get("rotation"):
        raise settings.refuse("rotation", f"only weights that are not rotated are read; {_INSTEAD}")
    if settings.get("pack_dtype", str, "int32") != "int32":
        raise settings.refuse("pack_dtype", f"only int32 is read; {_INSTEAD}")
    dynamic = settings.get("dynamic", dict, {})
    for pattern, changes in dynamic.items():
        try:
            re.compile(pattern.removeprefix("+:").removeprefix("-:"))
        except re.error as error:
            raise settings.refuse("dynamic", f"{pattern!r} is no pattern ({error})") from None
        if not isinstance(changes, dict):
            raise settings.refuse("dynamic", f"{pattern!r} must have a mapping")
    return GptqModules(
        bits=_bits(settings, None, (2, 3, 4, 8)),
        group_size=_group_size(settings, None),
        ordered=settings.get("desc_act", bool, False),
        zeros_less_one="gptq_v2" not in forms,
        source=settings.source,
        dynamic=dynamic,
    )


def _awq(settings: _Settings) -> Quantization:
    for key in ("version", "format", "checkpoint_format"):
        if settings.get(key, str, "gemm").lower() != "gemm":
            raise settings.refuse(key, f"only gemm is read; {_INSTEAD}")
    if settings.get("backend", str, "").lower() == "llm-awq":
        raise settings.refuse("backend", f"only AutoAWQ's layout is read; {_INSTEAD}")
    # AutoAWQ's own names, and those of transformers.
    names = {"w_bit": "bits", "q_group_size": "group_size"}
    fields = {names.get(key, key): value for key, value in settings.fields.items()}
    settings = dataclasses.replace(settings, fields=fields)
    return AwqModules(_bits(settings, None, (4, 8)), _group_size(settings, None))


def _fp8(settings: _Settings) -> Quantization:
    _say_weights_only(settings.source)
    if "weight_block_size" not in settings.fields:
        return Float8Modules(_DEFAULT_BLOCK, certain=False)
    return Float8Modules(_block(settings, "weight_block_size"))


def _compressed_tensors(settings: _Settings) -> Quantization:
    if settings.get("format", str) != "float-quantized":
        raise settings.refuse("format", f"only float-quantized is read; {_INSTEAD}")
    if settings.fields.get("transform_config"):
        raise settings.refuse("transform_config", f"activations would be transformed; {_INSTEAD}")
    blocks: set[tuple[int, int] | None] = set()
    for group in settings.get("config_groups", dict).values():
        weights = group.get("weights") if isinstance(group, dict) else None
        own = _Settings(weights if isinstance(weights, dict) else {}, f"{settings.source}, weights")
        if (own.get("type", str), own.get("num_bits", int)) != ("float", 8):
            raise own.refuse("num_bits", f"only float of 8 bits is read; {_INSTEAD}")
        if own.get("strategy", str) not in ("tensor", "channel", "block"):
            raise own.refuse("strategy", f"only tensor, channel and block are read; {_INSTEAD}")
        blocks.add(_block(own, "block_structure"))
    if len(blocks) != 1:
        raise settings.refuse("config_groups", f"only one way to scale is read; {_INSTEAD}")
    _say_weights_only(settings.source)
    return Float8Modules(blocks.pop())


def _block(settings: _Settings, key: str) -> tuple[int, int] | None:
    block = settings.get(key, list, None)
    if block is None:
        return None
    if len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise settings.refuse(key, "it must be two positive whole numbers")
    return block[0], block[1]


@functools.cache
def _say_weights_only(source: str) -> None:
    """Once a checkpoint, however often it is opened."""
    logging.warning(
        "%s: activations are not quantised here, only weights are read as they are stored", source
    )


_METHODS = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
}


def _bits(settings: _Settings, default: int | None, known: tuple[int, ...]) -> int:
    bits: int = settings.get("bits", int, *([] if default is None else [default]))
    if bits not in known:
        raise settings.refuse("bits", f"only {', '.join(map(str, known))} are read; {_INSTEAD}")
    return bits


def _group_size(settings: _Settings, default: int | None) -> int:
    size: int = settings.get("group_size", int, *([] if default is None else [default]))
    if size < 1 and size != -1:
        raise settings.refuse("group_size", "it must be positive, or -1 for a whole row")
    return size
