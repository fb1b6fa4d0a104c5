"""Stop strings against transformers' `generate(stop_strings=...)`, on one scripted model."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

import qwen_jax
from qwen_jax.config import ModelConfig
from tests.text.conftest import FIM
from tests.tiny_checkpoints import random_parameters, tiny_config, write_hf

pytest.importorskip("torch", reason="parity needs torch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
pytestmark = pytest.mark.live

# Each token once, since a script says what follows a token.
SCRIPT = "zxy<|im_start|>u\nqé<|file_sep|>w1<|im_end|>"


def scripted(config: ModelConfig, ids: list[int]) -> dict[str, np.ndarray]:
    """A model that writes these ids one after another: a token's row picks the next one's."""
    params = {k: np.full_like(v, "norm" in k) for k, v in random_parameters(config).items()}
    size, width = config.vocab_size, config.hidden_size
    params["model.embed_tokens.weight"][:, :size] = np.eye(size, dtype=np.float32)
    head = np.zeros((size, width), np.float32)
    for before, after in itertools.pairwise(ids):
        head[after, before] = 1.0
    params["lm_head.weight"] = head
    return params


@pytest.fixture(scope="module")
def directory(reference: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripted")
    library = tokenizers.Tokenizer.from_str(reference.to_str())
    library.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in FIM])
    config = tiny_config(
        num_layers=1, hidden_size=512, num_heads=4, num_kv_heads=2, ffn_size=64, vocab_size=400,
        tied=False,
    )  # fmt: skip
    ids = library.encode(SCRIPT, add_special_tokens=False).ids
    assert len(set(ids)) == len(ids) > 10
    write_hf(path, config, scripted(config, ids))
    library.save(str(path / "tokenizer.json"))
    made: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(made))
    return path


@pytest.fixture(scope="module")
def ours(directory: Path) -> qwen_jax.Model:
    return qwen_jax.load(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> tuple[Any, Any]:
    return (
        transformers.AutoModelForCausalLM.from_pretrained(directory),
        transformers.AutoTokenizer.from_pretrained(directory),
    )


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (["<|im_start|>"], "xy"),
        (["<|file_sep|>"], "xyu\nqé"),
        (["x"], ""),
        (["xy<|im_start|>u"], ""),
        (["y<|im_"], "x"),
        (["<|im_start|>u\nq"], "xy"),
        (["sep|>w"], "xyu\nqé<|file_"),
        (["nowhere", "1"], "xyu\nqé<|file_sep|>w"),
        (["w", "u\n"], "xy"),
        (["1<|im_end|>"], "xyu\nqé<|file_sep|>w"),
        (["nowhere"], "xyu\nqé<|file_sep|>w1"),
    ],
)
def test_the_same_tokens_are_written(
    stops: list[str], shown: str, ours: qwen_jax.Model, theirs: tuple[Any, Any]
) -> None:
    import torch

    model, tokenizer = theirs
    prompt = ours.tokenizer.encode("z")
    written = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=20,
        do_sample=False,
        stop_strings=stops,
        tokenizer=tokenizer,
        eos_token_id=list(ours.engine.spec.stop_ids),
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    found = ours.generate("z", raw=True, max_tokens=20, stop=stops)
    assert isinstance(found, qwen_jax.Completion)
    assert (list(found.tokens), found.finish_reason) == (written, "stop")
    # What is shown is before the stop string, and without control tokens.
    assert found.text == shown
