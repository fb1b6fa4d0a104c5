"""Hugging Face directories: config.json and the safetensors files that hold the weights."""

import re
from pathlib import Path
from typing import Any

from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.regular_files import is_there
from qwen_jax.strict_json import read_object
from qwen_jax.weights import recognition
from qwen_jax.weights.open_files import OpenFiles
from qwen_jax.weights.safetensors import read_safetensors
from qwen_jax.weights.tensors import TensorFiles, TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def open_directory(directory: Path) -> TensorFiles:
    """Opens a directory with config.json and model.safetensors, or shards.

    As in transformers, model.safetensors comes before shards, and which tensors a shard holds is
    what the shard says: the index only says which shards there are. Where both disagree but every
    tensor is there once, the files are read with a warning.

    Returns:
        The tensors; the metadata is config.json.

    Raises:
        UserError: naming file and field, for anything else.
    """
    config, opened = read_object(directory / "config.json", allow_nan=True), OpenFiles()
    single, index = directory / SINGLE, directory / INDEX
    if is_there(single):
        if _sets(directory):
            logging.warning("%s: read alone, since it is there; no shards are read", single)
        return TensorFiles((single,), config, read_safetensors(single, opened), opened=opened)
    weight_map = _weight_map(index) if is_there(index) else {}
    shards = _shards(directory, weight_map)
    tensors = _merge(shards, weight_map, index, opened)
    return TensorFiles(tuple(shards), config, tensors, opened=opened)


def _weight_map(index: Path) -> dict[str, Path | None]:
    """Which file holds which tensor, as the index has it; None for what is no file beside it."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        return {}

    def beside(file: Any) -> Path | None:
        plain = isinstance(file, str) and Path(file).name == file and file.isprintable()
        return index.with_name(file) if plain and file.endswith(".safetensors") else None

    return {name: beside(file) for name, file in weight_map.items()}


def _shards(directory: Path, weight_map: dict[str, Path | None]) -> list[Path]:
    """The files to read: those of the index and, by their names, the others of the same set."""
    listed = {path for path in weight_map.values() if path}
    sets = _sets(directory)
    missing = {path for path in listed if not is_there(path)}
    if listed and not missing:
        same = (paths for paths in sets.values() if listed & set(paths))
        return sorted(listed.union(*(filter(is_there, paths) for paths in same)))
    # The files may have been converted again, and the index be of before.
    whole = [paths for paths in sets.values() if all(is_there(path) for path in paths)]
    if len(whole) == 1:
        return whole[0]
    if listed:
        raise UserError(
            f"{directory / INDEX}: of the {len(listed)} shards, {_absent(missing)}; download all "
            "of them into this directory."
        )
    raise UserError(_none(directory, sets))


def _sets(directory: Path) -> dict[tuple[str, str], list[Path]]:
    """The shards that belong together by their names (`model-0000i-of-0000N`), here or not."""
    found = {}
    for file in directory.glob("model-*.safetensors"):
        name = _SHARD.fullmatch(file.name)
        if name and 1 <= int(name["number"]) <= int(name["count"]):
            stem, count = name["stem"], name["count"]
            found[stem, count] = [
                directory / f"{stem}-{number:05d}-of-{count}.safetensors"
                for number in range(1, int(count) + 1)
            ]
    return dict(sorted(found.items()))


def _none(directory: Path, sets: dict[tuple[str, str], list[Path]]) -> str:
    """Why the directory has no set of weights: parts of one, several, or other files."""
    if len(sets) == 1:
        (paths,) = sets.values()
        missing = {path for path in paths if not is_there(path)}
        return (
            f"{directory}: of the {len(paths)} shards, {_absent(missing)}; download all of "
            "them into this directory."
        )
    if sets:
        counts = " and of ".join(str(len(paths)) for paths in sets.values())
        return (
            f"{directory}: the directory has sets of {counts} shards, and no index that says which "
            "counts; leave one of them here."
        )
    others = sorted(file.name for file in directory.glob("*.safetensors") if file.is_file())
    if others:
        return (
            f"{directory}: the directory has neither {SINGLE} nor shards of one, only "
            f"{', '.join(others[:5])}; if one of them is the model, name it {SINGLE}, "
            "and shards of it model-00001-of-0000N.safetensors."
        )
    return recognition.without_safetensors(directory) or (
        f"{directory}: the directory has no safetensors; download those of the checkpoint."
    )


def _merge(
    shards: list[Path], weight_map: dict[str, Path | None], index: Path, opened: OpenFiles
) -> dict[str, TensorInfo]:
    """All shards' tensors; one that is in several is taken from where the index says."""
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_safetensors(shard, opened).items():
            if name not in tensors or weight_map.get(name) == shard:
                tensors[name] = info
            elif weight_map.get(name) != tensors[name].path:
                raise UserError(
                    f"{shard}: the tensor {name!r} is also in {tensors[name].path.name}, and "
                    f"{index.name} does not say which counts; remove the shard that is not of this "
                    "checkpoint."
                )
    held = {name: info.path for name, info in tensors.items()}
    astray = sorted(
        name
        for name in held.keys() | weight_map.keys()
        if name not in held or held[name] != weight_map.get(name)
    )
    if weight_map and astray:
        logging.warning(
            "%s: the index has %d tensors (%s first) where the shards do not; the shards count",
            *(index, len(astray), astray[0]),
        )
    return tensors


def _absent(paths: set[Path]) -> str:
    """`1 is not here (a)`, or `5 are not here (a, b, c, ...)`."""
    names = sorted(path.name for path in paths)
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {'is' if len(names) == 1 else 'are'} not here ({listed})"
