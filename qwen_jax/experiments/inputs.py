"""What an experiment reads besides its config, and by which contents it is known."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from ml_collections import ConfigDict

from qwen_jax import ready_made, regular_files
from qwen_jax.errors import UserError
from qwen_jax.opening import locate, locate_adapter
from qwen_jax.weights.hub_names import is_hub_name

_WHOLE = 64 << 20
"""Files up to this many bytes are hashed whole."""

_SAMPLES, _SAMPLE = 64, 64 << 10
"""Of larger ones, which are weights: this many pieces of this many bytes, evenly spread."""


def fingerprint(path: Path) -> str:
    """Of a file's size and contents, or of all files in a directory. Reads 68 MB at most a file.

    Raises UserError where it can't be read.
    """
    digest = hashlib.sha256()
    try:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not file.is_file() or file.suffix == ".pyc":
                continue
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path)}:{size}:".encode())
            with file.open("rb") as opened:
                if size <= _WHOLE:
                    while part := opened.read(1 << 20):
                        digest.update(part)
                    continue
                for sample in range(_SAMPLES):
                    opened.seek((size - _SAMPLE) * sample // (_SAMPLES - 1))
                    digest.update(opened.read(_SAMPLE))
    except OSError as error:
        raise UserError(f"{path} can't be read: {regular_files.why_not(error)}") from error
    return digest.hexdigest()[:16]


def of_points(configs: Iterable[ConfigDict]) -> dict[str, str]:
    """Fingerprints of all that the points read, by the name the config has for it.

    A model of the Hub is known by the commit in its name: listing points must not download it.
    """
    found: dict[str, str] = {}
    for config in configs:
        experiment = config.experiment
        _add(found, locate, (config.model, experiment.reference.model))
        _add(found, locate_adapter, config.adapter)
        texts = (config.prompt_file, config.tools, experiment.text, experiment.eval.include)
        _add(found, ready_made.path, texts)
    return found


def of_answers(config: ConfigDict) -> dict[str, str]:
    """The same of what decides an answer to a prompt."""
    found: dict[str, str] = {}
    _add(found, locate, (config.model,))
    _add(found, locate_adapter, config.adapter)
    _add(found, ready_made.path, (config.tools,))
    return found


def _add(
    found: dict[str, str], path_of: Callable[[str], Path], names: Iterable[str | None]
) -> None:
    for name in names:
        if name is None or name in found or (path_of is not ready_made.path and is_hub_name(name)):
            continue
        found[name] = fingerprint(path_of(name))
