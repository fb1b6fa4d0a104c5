"""Adapters against peft itself: what it saves, merged by us and by its own merge_and_unload."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="live parity needs pip install '.[parity]'")
pytest.importorskip("peft", reason="live parity needs pip install '.[parity]'")

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from qwen_jax import opening
from qwen_jax.engine.engine import Engine
from qwen_jax.weights.loader import load_parameters
from tests import transformers_reference
from tests.engines import relative
from tests.tiny_checkpoints import canonical, random_parameters, tiny_config, write_gguf, write_hf

pytestmark = pytest.mark.live

FLOAT32_BOUND = 1e-5
SEEDS = np.random.default_rng(int(os.environ["QWEN_JAX_LIVE_SEED"])).integers(2**31, size=1)
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES: dict[str, list[dict[str, Any]]] = {
    "plain": [{"target_modules": LAYER, "lora_alpha": 16}],
    "rank-stabilised": [{"target_modules": "all-linear", "lora_alpha": 5, "use_rslora": True}],
    "patterns": [
        {
            "target_modules": LAYER,
            "rank_pattern": {"v_proj": 3, r"layers\.1\.mlp\.up_proj": 5},
            "alpha_pattern": {"roj": 99, "q_proj": 7, "model.layers.0.mlp.down_proj": 2},
        }
    ],
    "several": [{"target_modules": LAYER}, {"target_modules": ["q_proj", "down_proj"], "r": 2}],
    "some-layers": [{"target_modules": ["q_proj"], "layers_to_transform": [1], "bias": "all"}],
    "ends": [{"target_modules": ["lm_head", "embed_tokens", "v_proj"]}],
    "saved": [{"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}],
    "orthogonal": [{"target_modules": LAYER, "init_lora_weights": "orthogonal", "r": 4}],
}

seeds = pytest.mark.parametrize("seed", SEEDS.tolist())


def trained(directory: Path, base: Any, config: dict[str, Any], seed: int) -> Path:
    """An adapter as peft saves it, each of its tensors moved away from where it begins."""
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | config))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name or value.requires_grad:
                value += 0.05 * torch.randn_like(value)
    model.save_pretrained(str(directory))
    return directory


@seeds
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_and_logits(tmp_path: Path, case: str, seed: int) -> None:
    config = tiny_config(hidden_size=64, ffn_size=96, head_dim=16, vocab_size=48, tied=False)
    params = random_parameters(config, seed)

    def base() -> Any:
        return transformers_reference.model(config, params)

    adapters = [
        trained(tmp_path / f"adapter-{i}", base(), changes, seed + i)
        for i, changes in enumerate(CASES[case])
    ]
    model = PeftModel.from_pretrained(base(), str(adapters[0]), adapter_name="0")
    for i, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(str(adapter), adapter_name=str(i))
    model.base_model.set_adapter([str(i) for i in range(len(adapters))])
    before = transformers_reference.logits(model, TEXT)
    merged = model.merge_and_unload()
    state = {name: value.detach().numpy() for name, value in merged.state_dict().items()}
    for path in (
        write_gguf(tmp_path / "base.gguf", config, params).path,
        write_hf(tmp_path / "base", config, params).path,
    ):
        checkpoint = opening.open_model(path, adapters)
        ours = load_parameters(checkpoint, "float32")
        for name, theirs in canonical(state).items():
            assert relative(np.asarray(ours[name]), theirs) <= 1e-6, name
    logits = Engine(checkpoint.config, ours).logits(TEXT)
    assert relative(logits, before) <= FLOAT32_BOUND


@seeds
@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["head", "embedding", "saved-embedding"],
)
def test_ends_of_a_tied_model(tmp_path: Path, changes: dict[str, Any], seed: int) -> None:
    """As peft runs them; its merge would change embedding and head together."""
    config = tiny_config(hidden_size=64, ffn_size=96, head_dim=16, vocab_size=48, tied=True)
    params = random_parameters(config, seed)
    adapter = trained(
        tmp_path / "adapter",
        transformers_reference.model(config, params),
        changes,
        seed,
    )
    model = PeftModel.from_pretrained(transformers_reference.model(config, params), str(adapter))
    path = write_hf(tmp_path / "base", config, params).path
    checkpoint = opening.open_model(path, adapter)
    logits = Engine(checkpoint.config, load_parameters(checkpoint, "float32")).logits(TEXT)
    assert relative(logits, transformers_reference.logits(model, TEXT)) <= FLOAT32_BOUND
