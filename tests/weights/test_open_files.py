"""Checkpoints that are replaced, written to or cut while they are read."""

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen_jax import api, loading, opening
from qwen_jax.errors import UserError
from qwen_jax.weights import checkpoint as checkpoint_module
from qwen_jax.weights.adapters import with_adapters
from qwen_jax.weights.loader import (
    Checkpoint,
    iter_parameters,
    load_parameters,
    open_checkpoint,
)
from tests.tiny_adapters import random_pairs, write_peft
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf, write_hf

CONFIG = tiny_config()
PARAMS = random_parameters(CONFIG)
OTHER = {name: value + 1 for name, value in PARAMS.items()}


def in_place(path: Path, data: bytes) -> None:
    """As `cp` writes over a file: it stays the same file."""
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(data)
    # A kernel's clock of 4 ms may not have moved on since the file was made.
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def norm(checkpoint: Checkpoint) -> np.ndarray:
    return np.asarray(load_parameters(checkpoint, "float32")["final_norm"])


@pytest.mark.parametrize("write", [write_gguf, write_hf])
def test_a_file_replaced_is_read_as_it_was(tmp_path: Path, write: Callable) -> None:
    """As downloads and `mv` replace one."""
    old, new = (write(tmp_path / f"{p is OTHER}", CONFIG, p).path for p in (PARAMS, OTHER))
    checkpoint = open_checkpoint(old)
    (path,), (other,) = checkpoint.files.paths, open_checkpoint(new).files.paths
    other.rename(path)
    np.testing.assert_array_equal(norm(checkpoint), PARAMS["model.norm.weight"])
    np.testing.assert_array_equal(norm(open_checkpoint(old)), OTHER["model.norm.weight"])


@pytest.mark.parametrize("write", [write_gguf, write_hf])
def test_another_process_opens_the_same_file_or_none(tmp_path: Path, write: Callable) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "old", CONFIG, PARAMS).path)
    sent = pickle.dumps(checkpoint)
    again: Checkpoint = pickle.loads(sent)
    np.testing.assert_array_equal(norm(again), norm(checkpoint))
    (path,), (other,) = (
        c.files.paths
        for c in (checkpoint, open_checkpoint(write(tmp_path / "new", CONFIG, OTHER).path))
    )
    os.utime(other, ns=(1, path.stat().st_mtime_ns + 1))
    other.rename(path)
    with pytest.raises(UserError, match="was written to while it was read"):
        pickle.loads(sent)


def test_what_is_hashed_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file takes the name between the two."""
    old, new = (write_gguf(tmp_path / f"{p is OTHER}", CONFIG, p).path for p in (PARAMS, OTHER))
    sha256 = hashlib.sha256(old.read_bytes()).hexdigest()
    check = checkpoint_module.check_sha256

    def then_replaced(*args: object) -> None:
        check(*args)  # type: ignore[arg-type]
        new.rename(old)

    monkeypatch.setattr(checkpoint_module, "check_sha256", then_replaced)
    found = norm(open_checkpoint(old, sha256=sha256))
    np.testing.assert_array_equal(found, PARAMS["model.norm.weight"])


@pytest.mark.parametrize("write", [write_gguf, write_hf])
@pytest.mark.parametrize("cut", [0, 1000, None])
def test_a_file_that_is_cut_or_written_to_is_refused(
    tmp_path: Path, write: Callable, cut: int | None
) -> None:
    """Before the first weight, and between two of them."""
    written = write(tmp_path / "m.gguf", CONFIG, PARAMS)
    checkpoint = open_checkpoint(written.path)
    (path,) = checkpoint.files.paths
    data = path.read_bytes()
    parameters = iter_parameters(checkpoint, "float32")
    next(parameters)
    in_place(path, data[:cut])
    said = f"{path}: the file was written to while it was read"
    for read in (lambda: dict(parameters), lambda: load_parameters(checkpoint, "float32")):
        with pytest.raises(UserError, match=said) as caught:
            read()
        sizes = "same size" if cut is None else f"it has {cut} bytes, and had {len(data)}"
        assert sizes in str(caught.value)
    assert checkpoint.files.opened[path].map.size() == (len(data) if cut is None else cut)


def test_a_file_written_to_after_its_last_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read last may be of the new file, so it is looked at once more."""
    path = tmp_path / "haiku.gguf"
    shutil.copy(opening.locate(), path)
    read = loading.prepare

    def then_written(*args: object) -> object:
        found = jax.block_until_ready(read(*args))  # type: ignore[arg-type]
        in_place(path, path.read_bytes())
        return found

    monkeypatch.setattr(loading, "prepare", then_written)
    with pytest.raises(UserError, match="written to while it was read"):
        api.load(path, weights="expanded", slots=1)


def test_a_file_that_shrinks_while_it_is_hashed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", CONFIG, PARAMS).path
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="written to while it was read"):
        open_checkpoint(path, sha256=sha256, progress=lambda done, total: os.truncate(path, 99))


def test_an_adapter_that_is_written_to(tmp_path: Path) -> None:
    model = write_hf(tmp_path / "model", CONFIG, PARAMS).path
    adapter = write_peft(tmp_path / "adapter", random_pairs(PARAMS))
    checkpoint = with_adapters(open_checkpoint(model), [adapter])
    path = adapter / "adapter_model.safetensors"
    in_place(path, path.read_bytes())
    with pytest.raises(UserError, match=f"{path}: the file was written to"):
        load_parameters(checkpoint, "float32")
