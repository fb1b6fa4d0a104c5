"""The files that a certificate rests on, and their hashes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qwen_jax.accuracy.certificate.contents import Input
from qwen_jax.accuracy.certificate.logs import is_log
from qwen_jax.accuracy.traces.foreign import MAPPING, dump_files, mapping_of
from qwen_jax.weights.loader import Checkpoint
from qwen_jax.weights.open_files import OpenFile


def owners(model: Path, adapters: Sequence[Path], dumps: Sequence[Path]) -> dict[str, Path]:
    """The file or directory of each, by what `Input.of` calls it."""
    named = {"checkpoint": model}
    named |= {f"adapter {i}": path for i, path in enumerate(adapters, 1)}
    return named | {f"engine {i}": path for i, path in enumerate(dumps, 1)}


def place(one: Mapping[str, str], inputs: Sequence[Mapping[str, str]], path: Path) -> Path:
    """Where a file that was read lies now: what is named is itself, whatever it was called, and has
    its mapping beside it; all else lies in that directory under its name.

    Args:
        one: fields of an `Input`,
        inputs: and of all.
        path: what is named as its owner now.
    """
    if path.is_dir():
        return path / one["file"]
    if one["file"].endswith("." + MAPPING):
        return path.with_name(f"{path.stem}.{MAPPING}")
    alike = [
        other
        for other in inputs
        if other["of"] == one["of"] and Path(other["file"]).suffix == path.suffix
    ]
    return path if alike == [one] else path.parent / one["file"]


def _homes(owned: Mapping[str, Path]) -> dict[str, Path]:
    return {name: path if path.is_dir() else path.parent for name, path in owned.items()}


def inputs_of(checkpoint: Checkpoint, dumps: Sequence[Path]) -> tuple[Input, ...]:
    """Every file of the checkpoint, its adapters and the dumps.

    Raises UserError where one can't be read.
    """
    return tuple(_inputs_of(checkpoint, dumps))


def _inputs_of(checkpoint: Checkpoint, dumps: Sequence[Path]) -> Iterator[Input]:
    places = _homes(owners(checkpoint.path, checkpoint.adapters, dumps))
    of_weights = {name: home for name, home in places.items() if not name.startswith("engine")}
    opened = checkpoint.files.opened
    for path, file in opened.items():  # the very files that the weights are read from
        yield Input(*_named(path, of_weights), file.sha256())
    for name, home in of_weights.items():
        for path in sorted(home.glob("*config.json")) if _has_config(checkpoint, name) else ():
            yield Input(name, path.name, OpenFile(path).sha256())
    for number, dump in enumerate(dumps, 1):
        of = f"engine {number}"
        for path in [dump] if is_log(dump) else _files_of(dump):
            file_name = path.relative_to(places[of]).as_posix()
            yield Input(of, file_name, OpenFile(path).sha256())


def _files_of(dump: Path) -> list[Path]:
    mapping = mapping_of(dump)
    return ([] if mapping is None else [mapping]) + dump_files(dump)


def _has_config(checkpoint: Checkpoint, name: str) -> bool:
    """A GGUF file's own metadata say what it is, whatever lies beside it."""
    if name == "checkpoint":
        return checkpoint.format == "safetensors"
    return checkpoint.adapters[int(name.split()[1]) - 1].is_dir()


def _named(path: Path, places: Mapping[str, Path]) -> tuple[str, str]:
    """Whose a file is, and its name there; of one that lies elsewhere, its path."""
    inside = [name for name, home in places.items() if path.is_relative_to(home)]
    if not inside:
        return "checkpoint", str(path)
    name = max(inside, key=lambda name: len(places[name].parts))
    return name, path.relative_to(places[name]).as_posix()
