"""A fault of weights has one meaning: planted by name, the audit of weights names the same."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.accuracy import transforms
from qwen_jax.accuracy.tensors.faults.catalogue import FAULTS
from qwen_jax.accuracy.tensors.planting import planted
from qwen_jax.accuracy.weights.audit import audit_weights
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf

CONFIG = tiny_config(num_layers=2, tied=False)
OTHERS = {
    "k_permuted_by_query_heads": dataclasses.replace(CONFIG, num_heads=4, num_kv_heads=2),
    "qk_exchanged": dataclasses.replace(CONFIG, num_heads=2, num_kv_heads=2),
    "previous_layer_weights": dataclasses.replace(CONFIG, num_layers=3),
} | {
    f"{fault}_tp{tp}": dataclasses.replace(CONFIG, num_heads=8, num_kv_heads=tp)
    for fault in ("all_reduce_missing", "heads_of_next_device", "part_twice")
    for tp in (4, 8)
}
"""Models that can have what `CONFIG` can't."""

MEANT = {
    "zeroed": "zeroed",
    # Its bytes, in the order of the other shape.
    "transposed": "dims-reversed",
    "first_block": "first-block-only",
    "all_reduce_missing": "part-missing",
    "heads_of_next_device": "parts-exchanged",
    "part_twice": "part-twice",
}
"""What the audit calls a fault that every matrix, or every number of devices, can have."""
CALLED = {
    "zero_qkv_bias": "zeroed",
    "qk_unpermuted": "rows-unpermuted",
    "qk_unpermuted_weight": "rows-unpermuted",
    "qk_permuted": "rows-permuted",
    "k_permuted_by_query_heads": "rows-permuted",
    "kv_exchanged": "fused-order",
    "qk_exchanged": "fused-order",
    "qkv_rows_grouped": "fused-order",
    "gate_up_exchanged": "fused-order",
    "next_layer_weights": "layer-order",
    "previous_layer_weights": "layer-order",
    "weights_bf16": "narrowed",
    "weights_f16": "narrowed",
    "norms_of_ones": "ones",
    "norms_plus_one": "norm-plus-one",
    "head_tied": "head-tied",
    "embedding_next_row": "rows-one-off",
}
FILES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "logits": "output",
    "embed": "token_embd", "attn_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "final_norm": "output_norm",
}  # fmt: skip
PLANTED = [name for name, fault in FAULTS.items() if fault.parameters is not None]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[ModelConfig, tuple[Path, Engine]]:
    made = {}
    for config in dict.fromkeys((CONFIG, *OTHERS.values())):
        path = tmp_path_factory.mktemp("one") / "model.gguf"
        path = write_gguf(path, config, random_parameters(config), types="Q8_0").path
        made[config] = (
            path,
            Engine(config, load_parameters(open_checkpoint(path), np.float32)),
        )
    return made


@pytest.mark.parametrize("name", PLANTED)
def test_planted_weights_are_called_the_same(
    engines: dict[ModelConfig, tuple[Path, Engine]], name: str
) -> None:
    fault, config = FAULTS[name], OTHERS.get(name, CONFIG)
    kind = CALLED.get(name) or next(k for begins, k in MEANT.items() if name.startswith(begins))
    path, engine = engines[config]
    with planted(engine, name) as wrong:
        found = [f for f in audit_weights(path, wrong) if f.verdict == "fault"]
    assert {f.tensor.split(".")[-2] for f in found} == {FILES[x] for x in fault.operations}
    for finding in found:
        assert kind in [cause.name for cause in finding.causes], (finding.tensor, finding.causes)


def test_the_permutation_is_that_of_llama_cpp() -> None:
    """Its source's own line; the other way is the inverse, which is another order of rows."""
    rows = np.arange(3 * 8 * 2).reshape(24, 2)
    theirs = rows.reshape(3, 2, 8 // 2, 2).swapaxes(1, 2).reshape(rows.shape)
    assert np.array_equal(transforms.permuted(rows, 3), theirs)
    assert np.array_equal(transforms.unpermuted(theirs, 3), rows)
    assert not np.array_equal(transforms.unpermuted(rows, 3), theirs)
