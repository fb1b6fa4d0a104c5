"""Files as PyTorch's wrappers and transformers write them, and as transformers reads them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="live comparisons need pip install '.[hf]'")
pytest.importorskip("transformers", reason="live comparisons need pip install '.[hf]'")

import torch
from safetensors.torch import save_file
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from transformers import AutoModelForCausalLM

from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests import transformers_reference
from tests.tiny_checkpoints import (
    Parameters,
    canonical,
    hf_config,
    random_parameters,
    tiny_config,
    write_hf,
)

pytestmark = pytest.mark.live

CONFIG = tiny_config(tied=False)
PARAMS = random_parameters(CONFIG)
INDEX = "model.safetensors.index.json"


def compiled_layers(model: Any) -> Any:
    model.model.layers = torch.nn.ModuleList(map(torch.compile, model.model.layers))
    return model


def checkpointed_layers(model: Any) -> Any:
    wrap = checkpoint_wrapper.CheckpointWrapper
    model.model.layers = torch.nn.ModuleList(map(wrap, model.model.layers))
    return model


WRAPPERS = {
    "nothing": lambda model: model,
    "DataParallel": torch.nn.DataParallel,
    "compile": torch.compile,
    "compiled DataParallel": lambda model: torch.compile(torch.nn.DataParallel(model)),
    "compiled layers": compiled_layers,
    "checkpointed layers": checkpointed_layers,
}


def assert_values(directory: Path, params: Parameters) -> None:
    loaded = load_parameters(open_checkpoint(directory), "float32")
    expected = canonical(params)
    assert loaded.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), values)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_state_of_a_wrapped_model(tmp_path, wrapper):
    model = WRAPPERS[wrapper](transformers_reference.model(CONFIG, PARAMS))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    assert_values(tmp_path, PARAMS)


@pytest.mark.parametrize("size", ["5GB", "1MB"])
def test_what_transformers_writes(tmp_path, size):
    """Whole, and the base model within; one file and shards."""
    tied = tiny_config()
    params = random_parameters(tied)
    model = transformers_reference.model(tied, params)
    model.save_pretrained(tmp_path / "whole", max_shard_size=size)
    model.model.save_pretrained(tmp_path / "base", max_shard_size=size)
    assert_values(tmp_path / "whole", params)
    assert_values(tmp_path / "base", params)


def reindexed(directory: Path, **changes: str | None) -> None:
    content = json.loads((directory / INDEX).read_text())
    content["weight_map"] |= changes
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v is not None}
    (directory / INDEX).write_text(json.dumps(content))


def one_file_beside_shards(directory: Path) -> None:
    other = {name: value + 1 for name, value in PARAMS.items()}
    written = write_hf(directory / "other", CONFIG, other).path
    shutil.copy(written / "model.safetensors", directory)


NORM, FIRST = "model.norm.weight", "model-00001-of-00003.safetensors"
DISAGREEMENTS = {
    "in another shard": lambda path: reindexed(path, **{NORM: FIRST}),
    "not in the index": lambda path: reindexed(path, **{NORM: None}),
    "only in the index": lambda path: reindexed(path, ghost=FIRST),
    "one file beside shards": one_file_beside_shards,
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_an_index_that_disagrees_is_read_as_transformers_does(tmp_path, case):
    write_hf(tmp_path, CONFIG, PARAMS, shards=3)
    DISAGREEMENTS[case](tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").state_dict()
    assert_values(tmp_path, {name: value.numpy() for name, value in theirs.items()})
