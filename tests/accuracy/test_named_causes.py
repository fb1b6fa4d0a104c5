"""Faults that another engine computes by code of its own are named: operation, layers, cause."""

import json
from pathlib import Path

import pytest

from qwen_jax.accuracy.diagnosis import Diagnosis, diagnose
from qwen_jax.accuracy.foreign import open_trace
from qwen_jax.accuracy.parameters import CheckpointSource
from tests.accuracy import other_engine
from tests.golden_cases import Case, odd_config
from tests.tiny_checkpoints import write_gguf

CASE = Case(odd_config(num_layers=3, ffn_size=128), seed=3)
TOKENS = CASE.prompt()[:24]
LINEAR = {"q_proj", "k_proj", "v_proj", "attn_residual", "gate_proj", "up_proj", "ffn_residual"}
"""What shows a wrong product in this engine's dump: it keeps no o_proj and no down_proj."""

WHERE = {
    "mask_one_ahead": {"attn_scores"},
    "mask_one_behind": {"attn_scores"},
    "mask_finite": {"attn_scores"},
    "sink_window": {"attn_scores"},
    "softmax_sink": {"attn_out"},
    "scores_bf16": {"attn_scores"},
    "scores_f16": {"attn_scores"},
    "scores_bf16_twice": {"attn_scores"},
    "scores_f16_twice": {"attn_scores"},
    "rope_part_of_head": {"q_rope", "k_rope"},
    "products_f16": LINEAR | {"logits"},
    "weights_bf16": LINEAR | {"embed", "logits"},
    "weights_f16": LINEAR | {"embed", "logits"},
}
OF_FLOAT32 = {"products_f16", "weights_bf16", "weights_f16"}
"""Which change nothing in an engine whose numbers are rounded so anyway."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    return write_gguf(path, CASE.config, CASE.parameters()).path


def examine(folder: Path, model: Path, dtype: str, fault: str = "") -> Diagnosis:
    other_engine.dump(folder, CASE.config, CASE.parameters(), TOKENS, dtype=dtype, fault=fault)
    if fault == "mask_finite":  # which no mapping tells
        path = folder / "mapping.json"
        fields = json.loads(path.read_text())
        del fields["tensors"]["layers.{i}.attn_scores"]["masked"]
        path.write_text(json.dumps(fields))
    source = CheckpointSource(model, dtype)
    return diagnose(open_trace(folder, source.config, tokens=TOKENS), source)


DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clean_engine_is_not_accused(tmp_path: Path, model: Path, dtype: str) -> None:
    found = examine(tmp_path, model, dtype)
    assert not found.faulty, found.first


@pytest.mark.parametrize(
    ("dtype", "fault"),
    [(d, f) for d in DTYPES[:2] for f in WHERE if d == "float32" or f not in OF_FLOAT32],
)
def test_it_is_named(tmp_path: Path, model: Path, dtype: str, fault: str) -> None:
    found = examine(tmp_path, model, dtype, fault)
    assert found.named == (fault,) and not found.unknown, (found.named, found.unknown)
    (cause,) = found.causes
    assert set(cause.operations) <= WHERE[fault]
    assert {layer for layer in cause.layers if layer is not None} == {0, 1, 2}
    assert cause.after.within and not cause.against
