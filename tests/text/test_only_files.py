"""Nothing of a checkpoint is read but regular files of a bounded size, and nothing that lies there
under a file's name is passed over in silence."""

import os
from pathlib import Path

import pytest
import tokenizers

from qwen_jax import recommended, regular_files
from qwen_jax.errors import UserError
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.weights.adapters import with_adapters
from qwen_jax.weights.loader import open_checkpoint
from tests.text.hf_directories import older, slow, write
from tests.tiny_adapters import random_pairs, write_peft
from tests.tiny_checkpoints import random_parameters, tiny_config, write_hf

CONFIG = tiny_config()
PARAMS = random_parameters(CONFIG)
READ = {  # Each read by the one or the other form of a directory.
    "config.json": None,
    "model.safetensors": None,
    "model-00001-of-00002.safetensors": None,
    "model.safetensors.index.json": None,
    "quantize_config.json": None,
    "generation_config.json": None,
    "tokenizer_config.json": None,
    "chat_template.jinja": None,
    "additional_chat_templates/x.jinja": None,
    "tokenizer.json": None,
    "vocab.json": slow,
    "merges.txt": slow,
    "added_tokens.json": older,
    "special_tokens_map.json": older,
    "adapter_config.json": None,
    "adapter_model.safetensors": None,
}
LARGE = ("tokenizer.json", "vocab.json")
SHARDED = ("model-00001-of-00002.safetensors", "model.safetensors.index.json")


def directory(tmp_path: Path, reference: tokenizers.Tokenizer, name: str) -> Path:
    """A checkpoint in which the file is read, but without it; and an adapter."""
    model = tmp_path / "model"
    model.mkdir()
    write(model, reference, READ[name] or (lambda files: None))
    write_hf(model, CONFIG, PARAMS, shards=2 if name in SHARDED else 1)
    write_peft(model, random_pairs(PARAMS))
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    return model


def read(model: Path) -> None:
    """All of a checkpoint that is read but its weights."""
    checkpoint = open_checkpoint(model)
    with_adapters(checkpoint, [model])
    recommended.read(checkpoint)
    Tokenizer.from_hf(model)


@pytest.mark.parametrize("name", READ)
def test_pipes_and_devices(tmp_path: Path, reference: tokenizers.Tokenizer, name: str) -> None:
    path = directory(tmp_path, reference, name) / name
    for make, words in (
        (os.mkfifo, "(it is a pipe, and no file"),
        (lambda path: path.symlink_to("/dev/zero"), "(it is a device, and no file"),
    ):
        make(path)
        with pytest.raises(UserError) as caught:
            read(tmp_path / "model")
        said = str(caught.value).replace(": it is", " (it is").replace("file.", "file)")
        assert said.startswith(str(path)) and words in said, said
        path.unlink()


@pytest.mark.parametrize("name", [n for n in READ if n.endswith(".json") and n not in LARGE])
def test_what_is_too_large(tmp_path: Path, reference: tokenizers.Tokenizer, name: str) -> None:
    """A file with a hole, which takes no room: what is read of it is bounded."""
    path = directory(tmp_path, reference, name) / name
    with path.open("wb") as file:
        file.write(b"{}")
        file.truncate(10**12)
    with pytest.raises(UserError, match=rf"{path}: .*it has more than 16000000 bytes"):
        read(tmp_path / "model")


def test_a_vocabulary_may_be_larger(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b" " * (regular_files.MOST_OF_CONFIG + 1) + b"{")
    with pytest.raises(UserError, match="it is not JSON"):
        Tokenizer.from_hf(tmp_path)
    with path.open("r+b") as file:
        file.truncate(10**12)
    with pytest.raises(UserError, match="it has more than 100000000 bytes"):
        Tokenizer.from_hf(tmp_path)
