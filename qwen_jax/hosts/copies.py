"""What a host that is not the first works on: copies of what the run goes on with.

It makes the same calls as the first one only if it finds the same answers done. What it writes is
thrown away.
"""

import atexit
import dataclasses
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen_jax.settings import Command

WRITTEN = ("output", "workdir")
"""Fields that name what a run writes, and goes on with."""

FILES = ("prompt_file", *WRITTEN)
"""Fields that name what all hosts must find alike."""


def seen(config: ConfigDict) -> dict[str, bytes]:
    """Of everything that hosts must find alike a digest, by what it is called."""
    found = {"settings": repr(sorted(config.to_dict().items())).encode()}
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
