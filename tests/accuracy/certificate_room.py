"""A model, dumps of engines that computed it, and certificates of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.accuracy import Certificate, certify
from tests.accuracy import other_engine
from tests.golden_cases import Case, odd_config
from tests.tiny_checkpoints import write_gguf

CASE = Case(odd_config(num_layers=2), seed=3)
TOKENS = CASE.prompt()[:12]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and dumps of engines that computed it; no test writes here."""
    folder = tmp_path_factory.mktemp("room")
    write_gguf(folder / "model.gguf", CASE.config, CASE.parameters())
    for name, wrong in {
        "clean": {},
        "narrow": {"dtype": "bfloat16"},
        "no_bias": {"biases": False},
        "pairs": {"interleaved": True},
    }.items():
        other_engine.dump(folder / name, CASE.config, CASE.parameters(), TOKENS, **wrong)
        mapping = json.loads((folder / name / "mapping.json").read_text())
        (folder / name / "mapping.json").write_text(json.dumps(mapping | {"tokens": TOKENS}))
    return folder


def of(room: Path, *dumps: str, **more: Any) -> Certificate:
    return certify(*(room / dump for dump in dumps), model=room / "model.gguf", **more)


def with_tensors(folder: Path, room: Path, **changed: np.ndarray | None) -> Path:
    """The clean dump with some arrays changed, or left out of the mapping."""
    shutil.copytree(room / "clean", folder / "dump")
    fields = json.loads((folder / "dump" / "mapping.json").read_text())
    for name, array in changed.items():
        if array is None:
            fields["tensors"] = {k: v for k, v in fields["tensors"].items() if name not in k}
        else:
            np.save(folder / "dump" / f"{name.replace('__', '/')}.npy", array)
    (folder / "dump" / "mapping.json").write_text(json.dumps(fields))
    return folder / "dump"


def written(folder: Path, text: str) -> Path:
    path = folder / "certificate.json"
    path.write_text(text)
    return path
