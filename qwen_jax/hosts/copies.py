"""What a host that is not the first works on: copies of what the run goes on with.

It makes the same calls as the first one only if it finds the same answers done. What it writes is
thrown away.
"""

import atexit
import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen_jax.settings import Command, flatten

WRITTEN = ("output", "workdir")
"""Fields that name what a run writes, and goes on with."""

SHOWN, BEFORE = 60, 20
"""Characters of a value that are shown, and of them before the first that differs."""


def settings(config: ConfigDict) -> dict[str, str]:
    """Every setting as it would be written in Python, by its name, as "sampling.seed"."""
    return {name: repr(value) for name, value in flatten(config)}


def difference(settings: Sequence[Mapping[str, str]]) -> str:
    """The first setting in which a host differs from the first one, both values and what else
    differs, in words.

    Args:
        settings: of every host, not all alike.
    """
    first = settings[0]
    number, other = next((i, one) for i, one in enumerate(settings, 1) if one != first)
    names = [n for n in (*first, *(other.keys() - first.keys())) if first.get(n) != other.get(n)]
    here, there = _apart(first.get(names[0], "nothing"), other.get(names[0], "nothing"))
    more = f", and {' and '.join(names[1:])}, too" if names[1:] else ""
    return f"{names[0]} is {here} on host 1, but {there} on host {number}{more}"


def _apart(one: str, other: str) -> tuple[str, str]:
    """Both, cut to what shows that they differ."""
    apart = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    at = next(apart, min(len(one), len(other)))
    start = at - BEFORE if at > SHOWN - BEFORE else 0
    return tuple(  # type: ignore[return-value]
        "..." * (start > 0) + x[start : start + SHOWN] + "..." * (len(x) > start + SHOWN)
        for x in (one, other)
    )


def seen(config: ConfigDict) -> dict[str, bytes]:
    """Of every file that hosts must find alike a digest, by what it is called."""
    found = {}
    if config.prompt_file is not None:
        found["prompt_file"] = _read(Path(config.prompt_file))
    for field in WRITTEN:
        if config[field] is not None:
            path = Path(config[field])
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            found[field] = repr([(str(f.relative_to(path)), _size(f)) for f in files]).encode()
    return {name: hashlib.sha256(content).digest() for name, content in found.items()}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # the task says what is wrong with it


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def on_copies(command: Command) -> tuple[Command, Path]:
    """The same command, which writes elsewhere, and the folder for that."""
    folder = Path(tempfile.mkdtemp(prefix="qwen-jax-host-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    changed: dict[str, Any] = {}
    for field in WRITTEN:
        if command.config[field] is None:
            continue
        path = Path(command.config[field])
        changed[field] = str(folder / field / path.name)
        (folder / field).mkdir()
        if path.is_dir():
            shutil.copytree(path, changed[field])
        elif path.exists():
            for file in path.parent.glob(f"{path.name}*"):
                shutil.copy(file, folder / field / file.name)
    command.config.update_from_flattened_dict(changed)
    overrides = {f: changed.get(f, value) for f, value in command.overrides.items()}
    return dataclasses.replace(command, overrides=overrides), folder
