"""A checkpoint of either format, checked against its own config before any weight is read."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.weights import names
from qwen_jax.weights.checksum import Progress, check_sha256
from qwen_jax.weights.gguf_file import open_gguf, split_paths
from qwen_jax.weights.hf_directory import open_directory
from qwen_jax.weights.quantization import Quantization, Unquantised, read_quantization
from qwen_jax.weights.stored import Stored
from qwen_jax.weights.tensors import TensorFiles, TensorInfo


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint whose tensors are all there, of the right shape and a known type.

    Attributes:
        path: what the user named: a GGUF file or a Hugging Face directory.
        files: the mapped files.
        parameters: what to load, each from which weights of the files.
        stored: how the files hold each of these weights.
        ignored: tensors that are in the files and that the model does not need.
    """

    path: Path
    format: names.Format
    config: ModelConfig
    files: TensorFiles
    parameters: tuple[names.Parameter, ...]
    stored: Mapping[str, Stored]
    ignored: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, Any]:
        """GGUF key-value pairs, or config.json."""
        return self.files.metadata

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.files.tensors

    @property
    def quantization(self) -> dict[str, int]:
        """How many weights are stored in which way (Q4_K, GPTQ-Int4), the most frequent first."""
        counts = collections.Counter(weight.kind for weight in self.stored.values())
        return dict(counts.most_common())


def open_checkpoint(
    path: str | Path, *, sha256: str | None = None, progress: Progress | None = None
) -> Checkpoint:
    """Opens a GGUF file (any part of a split one), a directory of one, or a Hugging Face directory.

    Args:
        sha256: what the GGUF file's SHA-256 must be; of a split one, each part's, with commas.
        progress: hears of the bytes hashed, file by file.

    Raises UserError for a damaged file, another architecture, metadata that contradict the
    tensors, and tensors that are missing, unknown, or of a wrong shape or type.
    """
    path = Path(path)
    if path.suffix in (".safetensors", ".json"):
        raise UserError(f"{path}: give the directory {path.parent} instead of one file in it.")
    if path.is_dir() and not (path / "config.json").exists():
        path = _only_gguf(path)
    if path.is_dir():
        if sha256 is not None:
            raise UserError(f"{path}: sha256 is for GGUF files, and this is a directory; drop it.")
        return _open_directory(path)
    if sha256 is not None:
        check_sha256(split_paths(path), sha256, progress)
    return _open_gguf(path)


def _only_gguf(directory: Path) -> Path:
    """The one GGUF checkpoint in a directory: a file, or the first part of a split one."""
    found = sorted(
        file
        for file in directory.glob("*.gguf")
        if "-of-" not in file.name or "-00001-of-" in file.name
    )
    if len(found) != 1:
        listed = f"the GGUF files {', '.join(file.name for file in found)}" if found else "no model"
        raise UserError(
            f"{directory}: the directory has no config.json and holds {listed}; name one GGUF "
            "file, or a directory with config.json and safetensors."
        )
    return found[0]


def _open_gguf(path: Path) -> Checkpoint:
    files = open_gguf(path)
    if not files.tensors:
        raise UserError(f"{path}: the file holds a vocabulary and no weights; choose a model file.")
    (embed,) = names.EMBED.sources
    (head,) = names.LM_HEAD.sources
    rows = files.tensors[embed.gguf].shape[0] if embed.gguf in files.tensors else 0
    if not rows:
        raise UserError(
            f"{path}: the tensor {embed.gguf!r} is missing, without which there is no vocabulary; "
            "the file is damaged or no language model."
        )
    # The format has no key for a tied head: its tensor is absent.
    config = ModelConfig.from_gguf(
        files.metadata, vocab_size=rows, tied=head.gguf not in files.tensors, source=str(path)
    )
    tokens = files.metadata.get("tokenizer.ggml.tokens", [])
    if len(tokens) > rows:  # fewer: the other rows are padding
        raise UserError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens)} tokens, but {embed.gguf} only {rows} "
            "rows; the tokenizer belongs to another model, so convert the checkpoint again."
        )
    return _checked(path, "gguf", config, files, Unquantised(), set())


def _open_directory(path: Path) -> Checkpoint:
    files = open_directory(path)
    config = ModelConfig.from_hf(files.metadata, source=str(path / "config.json"))
    head, embed = names.LM_HEAD.sources[0].safetensors, names.EMBED.sources[0].safetensors
    spare = set()
    if config.tied and {head, embed} <= files.tensors.keys():
        # Some tools save a tied head twice. A different one means that the config is wrong.
        if not _same(files, head, embed):
            raise UserError(
                f"{path / 'config.json'}: tie_word_embeddings is true, but {head} differs from "
                f"{embed}; set it to false, or download the checkpoint again."
            )
        spare = {head}
    quantization = read_quantization(files, path)
    spare |= {name for name in files.tensors if name.endswith(quantization.not_needed)}
    return _checked(path, "safetensors", config, files, quantization, spare | _zero_biases(files))


def _zero_biases(files: TensorFiles) -> set[str]:
    """Biases that change nothing: GPTQ's tools give one of zeros to modules that have none."""
    return {
        name for name in files.tensors if name.endswith("_proj.bias") and not files.raw(name).any()
    }


def _same(files: TensorFiles, first: str, second: str) -> bool:
    a, b = files.tensors[first], files.tensors[second]
    step = 1 << 20
    x, y = files.raw(first), files.raw(second)
    return (a.shape, a.type) == (b.shape, b.type) and all(
        np.array_equal(x[i : i + step], y[i : i + step]) for i in range(0, len(x), step)
    )


def _checked(
    path: Path,
    file_format: names.Format,
    config: ModelConfig,
    files: TensorFiles,
    quantization: Quantization,
    spare: set[str],
) -> Checkpoint:
    """Tensors against config; `spare` ones may be there without being needed."""
    tensors = files.tensors
    # Also keeps a damaged layer count from making a table of a billion names.
    if config.num_layers > len(tensors):
        raise UserError(
            f"{path}: the config has {config.num_layers} layers, but the checkpoint only "
            f"{len(tensors)} tensors; it is damaged or incomplete, so download it again."
        )
    parameters = names.parameters(config, file_format)
    stored: dict[str, Stored] = {
        name: quantization.stored(files, name, shape)
        for parameter in parameters
        for name, shape in parameter.sources.items()
    }
    wanted = dict.fromkeys(name for weight in stored.values() for name in weight.tensors)
    if missing := [name for name in wanted if name not in tensors]:
        raise UserError(
            f"{path}: of the {len(wanted)} tensors of this model, {_some(missing)} missing; the "
            "checkpoint is incomplete, so download or convert it again."
        )
    for weight in stored.values():
        weight.check(path)
    extra = tensors.keys() - wanted.keys()
    ignored = {name for name in extra if name.endswith(names.HARMLESS)} | (extra & spare)
    if unknown := sorted(extra - ignored):
        raise UserError(
            f"{path}: {_some(unknown)} no part of a Qwen2.5 model, and leaving it out could change "
            "the output; choose a plain Qwen2.5 checkpoint."
        )
    if ignored:
        logging.info("%s: ignored %s, not needed", path, ", ".join(sorted(ignored)))
    return Checkpoint(path, file_format, config, files, parameters, stored, tuple(sorted(ignored)))


def _some(tensors: Iterable[str]) -> str:
    """`'a' is`, or `'a', 'b', 'c' and 4 more are`."""
    listed = [repr(name) for name in tensors]
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return f"{', '.join(listed[:3])}{more} {'is' if len(listed) == 1 else 'are'}"
