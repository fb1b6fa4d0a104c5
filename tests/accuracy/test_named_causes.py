"""Faults that another engine computes by code of its own are named: operation, layers, cause."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.exact.replay import Replay
from qwen_jax.accuracy.exact.rounding import round_to
from qwen_jax.accuracy.report.tables import cause_table
from qwen_jax.accuracy.tensors.diagnosis import Diagnosis, diagnose
from qwen_jax.accuracy.traces.foreign import open_trace
from qwen_jax.accuracy.traces.trace import Trace
from tests.accuracy import other_engine
from tests.accuracy.planted_traces import source, trace
from tests.golden_cases import Case, odd_config
from tests.tiny_checkpoints import write_gguf

CASE = Case(odd_config(num_layers=3, ffn_size=128), seed=3)
TOKENS = CASE.prompt()[:24]
# With some below 2^-14, where TF32 keeps more of a number than float16 does.
PARAMETERS = {
    name: value * np.float32(2**-9 if "up_proj" in name else 1)
    for name, value in CASE.parameters().items()
}
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
    return write_gguf(path, CASE.config, PARAMETERS).path


def examine(
    folder: Path,
    model: Path,
    dtype: str,
    fault: str = "",
    parameters: Mapping[str, np.ndarray] = PARAMETERS,
) -> Diagnosis:
    other_engine.dump(folder, CASE.config, parameters, TOKENS, dtype=dtype, fault=fault)
    if fault == "mask_finite":  # which no mapping tells
        path = folder / "mapping.json"
        fields = json.loads(path.read_text())
        del fields["tensors"]["layers.{i}.attn_scores"]["masked"]
        path.write_text(json.dumps(fields))
    source = CheckpointSource(model, dtype)
    return diagnose(open_trace(folder, source.config, tokens=TOKENS), source)


def told(found: Diagnosis) -> set[str]:
    """Every fault that is named, or told beside one as explaining as much."""
    return {name for c in found.causes for faults in ((c.fault.name,), *c.ties) for name in faults}


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
    assert not cause.ties


def test_exchanged_layers(tmp_path: Path, model: Path) -> None:
    found = examine(tmp_path, model, "float32", "layers_exchanged")
    layers = {cause.fault.name: cause.layers for cause in found.causes}
    assert layers == {"next_layer_weights": (0,), "previous_layer_weights": (1,)}
    assert not found.unknown


def test_an_eps_is_where_it_is_seen_and_perhaps_elsewhere(tmp_path: Path, model: Path) -> None:
    """The stream grows from layer to layer, and hides it."""
    found = examine(tmp_path, model, "float32", "norm_eps_1e-5")
    assert found.named == ("norm_eps_1e-5",) and not found.unknown
    (row,) = cause_table(found, CASE.config.num_layers).rows
    assert re.search(r"visible in layers \S+, present at least there", row[-1])


def test_a_rounding_that_is_there_anyway_explains_nothing(tmp_path: Path, model: Path) -> None:
    """A little past their bounds, in an engine that keeps bfloat16: where its end is rounded up."""
    source = CheckpointSource(model, "bfloat16")
    other_engine.dump(tmp_path, CASE.config, PARAMETERS, TOKENS, dtype="bfloat16")
    trace = open_trace(tmp_path, source.config, tokens=TOKENS)
    name = "layers.1.attn_residual"
    judged = next(r for r in Replay(trace, source) if r.finding.name == name)
    end = judged.expected + judged.bound
    past = round_to(end, "bfloat16", np)
    wrong = np.where(past > end, past, judged.candidate)
    assert 0.1 < (past > end).mean() < 0.9
    tensors = {**trace.tensors, name: wrong.astype(trace.tensors[name].dtype)}
    found = diagnose(Trace(trace.header, tensors), source)
    assert name in [unknown.finding.name for unknown in found.unknown]
    assert "stream_bf16" not in found.named and "stream_f16" not in found.named


@pytest.mark.parametrize("past", [1.5, 2.0, 4.0])
@pytest.mark.parametrize(
    ("unrecorded", "operation"), [("ffn_act", "ffn_residual"), ("attn_norm", "q_proj")]
)
def test_operands_that_are_rounded_so_anyway_explain_nothing(
    tmp_path: Path, model: Path, unrecorded: str, operation: str, past: float
) -> None:
    """An error to either side, some times the bound, after a tensor that isn't there."""
    source = CheckpointSource(model, "bfloat16")
    other_engine.dump(tmp_path, CASE.config, PARAMETERS, TOKENS, dtype="bfloat16")
    trace = open_trace(tmp_path, source.config, tokens=TOKENS)
    tensors = {n: x for n, x in trace.tensors.items() if not n.endswith(unrecorded)}
    name = f"layers.1.{operation}"
    judged = next(r for r in Replay(Trace(trace.header, tensors), source) if r.finding.name == name)
    sides = np.random.default_rng(0).choice([-past, past], judged.bound.shape)
    wrong = (judged.expected + sides * judged.bound).astype(tensors[name].dtype)
    found = diagnose(Trace(trace.header, tensors | {name: wrong}), source)
    assert not told(found) & {"products_tf32", "products_f16", "products_bf16"}
    assert name in [finding.name for finding in found.faulty]


def test_what_cannot_be_told_apart_is_a_tie(tmp_path: Path) -> None:
    """float16 holds what TF32 holds, where no number is so small."""
    parameters = CASE.parameters()
    model = write_gguf(tmp_path / "model.gguf", CASE.config, parameters).path
    found = examine(tmp_path, model, "float32", "products_f16", parameters)
    assert len(found.causes) == 1 and told(found) == {"products_f16", "products_tf32"}
    assert not found.unknown


@pytest.mark.parametrize(
    ("dtype", "faults"),
    [
        (
            "float32",
            "weights_bf16@0,products_f16@1,rope_part_of_head@0,softmax_sink@1,mask_one_ahead@0,"
            "scores_bf16_twice@1",
        ),
        ("bfloat16", "rope_part_of_head@1,softmax_sink@0,sink_window@0,mask_finite@1"),
    ],
)
def test_planted_in_our_engine(dtype: str, faults: str) -> None:
    found = diagnose(trace(faults, dtype), source(dtype))
    layers = {cause.fault.name: cause.layers for cause in found.causes}
    assert layers == {
        name: (int(layer),) for name, layer in (one.split("@") for one in faults.split(","))
    }
    assert not found.unknown


def test_what_does_as_well_is_told_beside_another_fault() -> None:
    """An operation that has both has other sets of causes than those with the first alone."""
    found = diagnose(trace("products_f16,first_block_down_proj", "float32"), source("float32"))
    causes = {cause.fault.name: set(cause.ties) for cause in found.causes}
    assert causes.pop("first_block_down_proj") == set()
    ((named, ties),) = causes.items()
    assert {(named,), *ties} == {("products_f16",), ("products_tf32",)}
