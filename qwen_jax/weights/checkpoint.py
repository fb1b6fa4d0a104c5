"""A checkpoint of either format, checked against its own config before any weight is read."""

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from qwen_jax import config_gguf, config_hf, regular_files
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.file_kinds import kind_of
from qwen_jax.weights import names, recognition
from qwen_jax.weights.checksum import check_sha256
from qwen_jax.weights.gguf_file import open_gguf, split_paths
from qwen_jax.weights.hf_directory import INDEX, open_directory
from qwen_jax.weights.open_files import OpenFiles, Progress
from qwen_jax.weights.prefixes import Naming
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
        adapters: what has changed weights, see `weights.adapters`.
    """

    path: Path
    format: names.Format
    config: ModelConfig
    files: TensorFiles
    parameters: tuple[names.Parameter, ...]
    stored: Mapping[str, Stored]
    ignored: tuple[str, ...]
    adapters: tuple[Path, ...] = ()

    @property
    def metadata(self) -> dict[str, Any]:
        """GGUF key-value pairs, or config.json."""
        return self.files.metadata

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.files.tensors

    def check_unchanged(self) -> None:
        """Raises UserError where a file, an adapter's too, was written to since it was opened.

        To be called when the weights are read: what came last may be of the new file.
        """
        self.files.opened.check()

    @property
    def quantization(self) -> dict[str, int]:
        """How many weights are stored in which way (Q4_K, GPTQ-Int4), the most frequent first."""
        counts = collections.Counter(weight.kind for weight in self.stored.values())
        return dict(counts.most_common())


def open_checkpoint(
    path: str | Path, *, sha256: str | None = None, progress: Progress | None = None
) -> Checkpoint:
    """Opens a GGUF file (any part of a split one), a Hugging Face directory, or one file of it.

    Args:
        path: also a directory that holds one GGUF model; a file is known by its content.
        sha256: what the GGUF file's SHA-256 must be; of a split one, each part's, with commas.
        progress: hears of the bytes hashed, file by file.

    Raises UserError for a file that is not well-formed, another kind of model, metadata that
    contradict the tensors, and tensors that are missing, unknown, or of a wrong shape or type.
    """
    given = Path(path)
    try:
        return _open(given, sha256, progress)
    except OSError as error:  # a directory that may be listed and not entered
        raise UserError(f"{given}: it can't be read: {regular_files.why_not(error)}") from None


def _open(given: Path, sha256: str | None, progress: Progress | None) -> Checkpoint:
    path = given.parent if _stands_for_directory(given) else given
    if not _is_hf(path):
        opened = OpenFiles()
        if path.is_dir():
            path = _only_gguf(path)
        if sha256 is not None:
            check_sha256(opened, split_paths(path), sha256, progress)
        return _open_gguf(path, opened)
    if sha256 is not None:
        raise UserError(f"{given}: sha256 is for GGUF files, and this is none; drop it.")
    checkpoint = _open_directory(path)
    if given.suffix == ".safetensors" and given.is_file() and given not in checkpoint.files.paths:
        raise UserError(
            f"{given}: the model in this directory is {checkpoint.files.paths[0].name}; give the "
            "directory, or put the other model into a directory of its own with its config.json."
        )
    return checkpoint


def _stands_for_directory(path: Path) -> bool:
    """Whether it is a file that means the Hugging Face checkpoint, or adapter, in which it lies."""
    configs = ("config.json", "adapter_config.json")
    if path.suffix != ".safetensors" or not path.is_file():
        return path.name in (*configs, INDEX) and regular_files.is_there(path)
    beside = any((path.parent / config).is_file() for config in configs)
    return beside and kind_of(path, "safetensors") is None


def _is_hf(directory: Path) -> bool:
    """Repositories of GGUF files may have a config.json too, but no safetensors."""
    kinds = {file.suffix.lower() for file in directory.glob("*") if file.is_file()}
    return regular_files.is_there(directory / "config.json") and (
        ".safetensors" in kinds or ".gguf" not in kinds
    )


def _only_gguf(directory: Path) -> Path:
    """The one GGUF checkpoint in a directory: a file, or the first part of a split one."""
    files = [f for f in directory.glob("*") if f.suffix.lower() == ".gguf" and f.is_file()]
    found = sorted({split_paths(file)[0] for file in files})
    if len(found) == 1:
        return found[0]
    if not found and (told := recognition.without_config(directory)):
        raise UserError(told)
    listed = f"the GGUF files {', '.join(file.name for file in found)}" if found else "no model"
    raise UserError(
        f"{directory}: the directory has no safetensors with a config.json and holds {listed}; "
        "name one GGUF file, or a directory with config.json and safetensors."
    )


def _open_gguf(path: Path, opened: OpenFiles) -> Checkpoint:
    files = open_gguf(path, opened)
    recognition.check_gguf(path, files.metadata, files.tensors)
    if not files.tensors:
        raise UserError(f"{path}: the file holds a vocabulary and no weights; choose a model file.")
    (embed,) = names.EMBED.sources
    (head,) = names.LM_HEAD.sources
    rows = files.tensors[embed.gguf].shape[0] if embed.gguf in files.tensors else 0
    if not rows:
        raise UserError(
            f"{path}: the tensor {embed.gguf!r} is missing, without which there is no vocabulary; "
            "choose the GGUF file of a Qwen2.5 language model."
        )
    # The format has no key for a tied head: its tensor is absent.
    config = config_gguf.read(
        files.metadata, vocab_size=rows, tied=head.gguf not in files.tensors, source=str(path)
    )
    tokens = files.metadata.get("tokenizer.ggml.tokens")
    # Fewer: the other rows are padding. No list: whoever reads the tokenizer says so.
    if isinstance(tokens, list) and len(tokens) > rows:
        raise UserError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens)} tokens, but {embed.gguf} only {rows} "
            "rows; the tokenizer belongs to another model, so convert the checkpoint again."
        )
    return _checked(path, "gguf", config, files, Unquantised(), set())


def _open_directory(path: Path) -> Checkpoint:
    files = open_directory(path)
    recognition.check_directory(path, files.metadata, files.tensors)
    naming = Naming.of(files.tensors)
    files = naming.rename(files, path)
    config = config_hf.read(files.metadata, source=str(path / "config.json"))
    head, embed = names.LM_HEAD.sources[0].safetensors, names.EMBED.sources[0].safetensors
    if config.tied and embed not in files.tensors and head in files.tensors:
        # safetensors' save_model keeps the first of the names that share a tensor.
        tensors = {embed if name == head else name: t for name, t in files.tensors.items()}
        files = dataclasses.replace(files, tensors=tensors)
    spare = set()
    if config.tied and {head, embed} <= files.tensors.keys():
        # Some tools save a tied head twice. A different one means that the config is wrong.
        if not _same(files, head, embed):
            raise UserError(
                f"{path / 'config.json'}: tie_word_embeddings is true, but {head} differs from "
                f"{embed}; set it to false if the model was trained with a head of its own."
            )
        spare = {head}
    quantization = read_quantization(files, path)
    spare |= {name for name in files.tensors if name.endswith(quantization.not_needed)}
    spare |= _zero_biases(files)
    return _checked(path, "safetensors", config, files, quantization, spare, naming)


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
    naming: Naming | None = None,
) -> Checkpoint:
    """Tensors against config; `spare` ones may be there without being needed."""
    tensors = files.tensors
    # Also keeps a damaged layer count from making a table of a billion names.
    if config.num_layers > len(tensors):
        raise UserError(
            f"{path}: the config has {config.num_layers} layers, but the checkpoint only "
            f"{len(tensors)} tensors; take the config and all files of one checkpoint."
        )
    parameters = names.parameters(config, file_format)
    stored: dict[str, Stored] = {
        name: quantization.stored(files, name, shape)
        for parameter in parameters
        for name, shape in parameter.sources.items()
    }
    wanted = dict.fromkeys(name for weight in stored.values() for name in weight.tensors)
    if missing := [name for name in wanted if name not in tensors]:
        raise UserError(_missing(path, missing, wanted, files, naming))
    for weight in stored.values():
        weight.check(path)
    extra = tensors.keys() - wanted.keys()
    ignored = {name for name in extra if name.endswith(names.HARMLESS)} | (extra & spare)
    if unknown := sorted(extra - ignored):
        raise UserError(
            f"{path}: {_some(tensors[name].name for name in unknown)} no part of a Qwen2.5 model, "
            "and leaving it out could change the output; choose a plain Qwen2.5 checkpoint."
        )
    if ignored:
        logging.info("%s: ignored %s, not needed", path, ", ".join(sorted(ignored)))
    return Checkpoint(path, file_format, config, files, parameters, stored, tuple(sorted(ignored)))


def _missing(
    path: Path,
    missing: list[str],
    wanted: Collection[str],
    files: TensorFiles,
    naming: Naming | None,
) -> str:
    """Says what is missing by the names of this checkpoint, and what is there instead."""
    own = [naming.own(name) if naming else name for name in missing]
    if missing == [names.LM_HEAD.sources[0].safetensors]:
        return recognition.missing_head(path, own[0], files.metadata)
    others = sorted(info.name for name, info in files.tensors.items() if name not in wanted)
    instead = f"; {_some(others)} no part of it" if others else ""
    return (
        f"{path}: of the {len(wanted)} tensors of this model, {_some(own)} missing{instead}; take "
        "the config and all files of one checkpoint, or convert it again."
    )


def _some(tensors: Iterable[str]) -> str:
    """`'a' is`, or `'a', 'b', 'c' and 4 more are`."""
    listed = [repr(name) for name in tensors]
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return f"{', '.join(listed[:3])}{more} {'is' if len(listed) == 1 else 'are'}"
