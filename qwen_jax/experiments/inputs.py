"""What an experiment reads besides its config, and by which contents it is known."""

import hashlib
import itertools
import os
from collections.abc import Callable, Collection, Iterable
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


_MOST_FILES = 10_000
"""In a directory: lm-evaluation-harness has 14,000 of its own, and / has no end."""


def fingerprint(path: Path, within: str = "*") -> str:
    """Of a file's size and contents, or of the files in a directory. Reads 68 MB at most a file.

    Args:
        within: which files of a directory, as a glob.

    Raises UserError where it can't be read.
    """
    digest = hashlib.sha256()
    try:
        found = path.glob(within) if path.is_dir() else [path]
        files = list(itertools.islice(found, _MOST_FILES + 1))
        if len(files) > _MOST_FILES:
            raise UserError(
                f"{path} holds more than {_MOST_FILES} files, and all of them would have to be "
                "read; name a directory that has only what is meant."
            )
        for file in sorted(files):
            if not file.is_file() or file.suffix == ".pyc":
                continue
            size = file.stat().st_size
            digest.update(os.fsencode(file.relative_to(path)) + f":{size}:".encode())
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
        _add(found, locate, (config.model, experiment.reference.model, experiment.judge.model))
        _add(found, locate_adapter, config.adapter)
        found |= of_texts(config, found)
        _add(found, ready_made.path, (experiment.eval.include,), "**/*")
    return found


def of_texts(config: ConfigDict, known: Collection[str] = ()) -> dict[str, str]:
    """The same of the texts and prompts of one point, but for those that are known."""
    found: dict[str, str] = {}
    texts = (config.prompt_file, config.tools, config.experiment.text)
    names = (name for name in texts if name and name not in known)
    _add(found, ready_made.path, [name for name in names if _is_file(name)])
    return found


def of_answers(config: ConfigDict) -> dict[str, str]:
    """The same of what decides an answer to a prompt."""
    found: dict[str, str] = {}
    _add(found, locate, (config.model,))
    _add(found, locate_adapter, config.adapter)
    _add(found, ready_made.path, (config.tools,))
    return found


def _is_file(name: str) -> bool:
    """Whether a text is one to be read, or not there; a directory is refused by whoever opens it,
    and there is no need to read all that is in it first."""
    return not os.path.isdir(ready_made.path(name))  # noqa: PTH112 - as in `ready_made`


def _add(
    found: dict[str, str],
    path_of: Callable[[str], Path],
    names: Iterable[str | None],
    within: str = "*",
) -> None:
    for name in names:
        if name is None or name in found or (path_of is not ready_made.path and is_hub_name(name)):
            continue
        found[name] = fingerprint(path_of(name), within)
