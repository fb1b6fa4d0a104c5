"""Nothing is claimed of what can't be judged: NaN, infinities, dtypes, vocabularies, positions that
are missing, in every entry of the laboratory."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_jax.accuracy.cache.audit import audit_cache
from qwen_jax.accuracy.distribution.base_file import SavedBase, save
from qwen_jax.accuracy.distribution.comparison import score
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.exact.replay import compare as compared
from qwen_jax.accuracy.measures.metrics import logit_metrics
from qwen_jax.accuracy.references import reference
from qwen_jax.accuracy.report import Report, text, values
from qwen_jax.accuracy.tensors.comparison import compare
from qwen_jax.accuracy.tensors.diagnosis import Diagnosis, diagnose
from qwen_jax.accuracy.text.audit import audit_text
from qwen_jax.accuracy.traces.trace import Trace
from qwen_jax.accuracy.weights.audit import audit_weights
from qwen_jax.accuracy.weights.checkpoint_values import CheckpointValues
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError
from qwen_jax.weights.loader import Checkpoint, load_parameters, open_checkpoint
from tests.engines import device_parameters
from tests.golden_cases import CASES
from tests.tiny_checkpoints import write_gguf

CASE = CASES["tied"]
TOKENS = CASE.prompt()[:8]
GATE, FILE = "model.layers.0.mlp.gate_proj.weight", "blk.0.ffn_gate.weight"


def checkpoint(folder: Path, value: float | None = None) -> Checkpoint:
    """A model, perhaps with one odd weight."""
    params = CASE.parameters()
    if value is not None:
        params[GATE] = params[GATE].copy()
        params[GATE][3, 5] = value
    return open_checkpoint(write_gguf(folder / "model.gguf", CASE.config, params).path)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Trace]:
    """A model, and a trace of it in float32."""
    model = checkpoint(tmp_path_factory.mktemp("model"))
    truth = reference("float64", model, TOKENS)
    header = dataclasses.replace(truth.header, activation_dtype="float32")
    return model, Trace(header, {n: x.astype(np.float32) for n, x in truth.tensors.items()})


def with_value(trace: Trace, name: str, value: float) -> Trace:
    tensor = trace.tensors[name].copy()
    tensor[2, ..., 1] = value
    return Trace(trace.header, {**trace.tensors, name: tensor})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["layers.0.up_proj", "logits", "layers.1.attn_scores"])
def test_a_reference_that_is_not_finite(right: Any, name: str, value: float) -> None:
    """-inf is what masked scores are, and future ones alone."""
    _, trace = right
    with pytest.raises(UserError, match=f"reference's {name} .*{value}"):
        compare(trace, with_value(trace, name, value))


def test_a_reference_less_exact_than_the_candidate(right: Any) -> None:
    _, trace = right
    for field in ("dtype", "activation_dtype"):
        coarse = Trace(dataclasses.replace(trace.header, **{field: "bfloat16"}), trace.tensors)
        with pytest.raises(UserError, match=f"{field} bfloat16 .* float32"):
            compare(trace, coarse)
        compare(coarse, trace)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_is_not_finite(tmp_path: Path, right: Any, value: float) -> None:
    """Whose NaN would be as good as any engine's."""
    model, (_, trace) = checkpoint(tmp_path, value), right
    message = r"model.gguf: .*gate.* not finite"
    with pytest.raises(UserError, match=message):
        diagnose(with_value(trace, "layers.0.gate_proj", value), CheckpointSource(model))
    with pytest.raises(UserError, match=message):
        reference("float64", model, TOKENS)
    with pytest.raises(UserError, match=message):
        audit_weights(model, {FILE: CheckpointValues(model).rows(FILE)})
    with pytest.raises(UserError, match=message):
        load_parameters(model, "float32")
    params = device_parameters(CASE.parameters(), "float32")
    name = "layers.0.gate_up_proj.weight"
    params[name] = params[name].at[3, 5].set(value)
    with pytest.raises(UserError, match="keys of layer 1 of the model itself are not finite"):
        audit_cache(Engine(model.config, params))


@pytest.mark.parametrize("kind", ["int8", "complex64", "bool", "object", "<U3"])
def test_weights_of_another_dtype(right: Any, kind: str) -> None:
    model, _ = right
    held = {FILE: np.zeros((CASE.config.ffn_size, CASE.config.hidden_size)).astype(kind)}
    with pytest.raises(UserError, match=f"{FILE}.* dtype "):
        audit_weights(model, held)


@pytest.mark.parametrize("ids", [[1.5, 2], [float("nan")], ["1"], [True], [None]])
def test_ids_that_are_no_integers(right: Any, ids: list) -> None:
    with pytest.raises(UserError, match="integers"):
        audit_text(Any, {"digits": ids})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="integers"):
        audit_text(Any, {}, stop_ids=ids)  # type: ignore[arg-type]


def test_a_bound_without_end_judges_nothing() -> None:
    one = np.ones((2, 3))
    assert compared(one + 1, one, np.inf * one).ratio == np.inf
    assert compared(one, one, np.inf * one).ratio == 0


def diagnosed(right: Any, factor: float) -> Diagnosis:
    """Of float64 dumps, whose squares may overflow: wrong ones."""
    model, trace = right
    names = ("layers.0.attn_out", "layers.0.o_proj")
    wide = {n: trace.tensors[n].astype(np.float64) * factor for n in names}
    wide["layers.0.o_proj"] *= 3
    return diagnose(Trace(trace.header, wide), CheckpointSource(model))


def test_dumps_whose_bound_overflows_are_not_within_it(right: Any) -> None:
    found = diagnosed(right, 1e200)
    assert "o_proj" in {f.operation for f in found.faulty}


def test_the_verdict_counts_what_it_does_not_judge(right: Any) -> None:
    model, trace = right
    header = dataclasses.replace(trace.header, start=3)
    late = {n: x[3:] for n, x in trace.tensors.items()}
    found = diagnose(Trace(header, late), CheckpointSource(model))
    assert len(found.skipped) == 2 * CASE.config.num_layers and not found.faulty
    report = Report(candidate=header, diagnosis=found)
    assert "6 recorded tensors are not judged" in " ".join(text(report).split())
    alone = {n: x for n, x in late.items() if n.endswith("attn_out")}
    found = diagnose(Trace(header, alone), CheckpointSource(model))
    shown = text(Report(candidate=header, diagnosis=found))
    assert not found.findings and "WITHIN" not in shown and "NOT JUDGED" in shown
    assert not {"faults", "unknown", "of_bound"} & values(Report(diagnosis=found)).keys()


def test_nan_agrees_with_nothing() -> None:
    """The first NaN of a row is its maximum to NumPy, and id 0 may well be the likeliest."""
    base = np.zeros((4, 5))
    base[:, 0] = 3
    lost = np.full_like(base, np.nan)
    found = logit_metrics(lost, base)
    assert found.top1 == 0 and found.topk == 0
    scores = score(lost, base, np.zeros(9, np.int32), normal=False)
    assert not scores.same_top.any() and np.isnan(scores.kld).all()


@pytest.mark.parametrize("token", [-1, 61, 1 << 30])
@pytest.mark.parametrize("suffix", [".safetensors", ".kld"])
def test_a_base_with_ids_of_another_vocabulary(tmp_path: Path, suffix: str, token: int) -> None:
    windows = np.zeros((2, 9), np.int32)
    windows[1, 3] = token
    logits = iter([np.zeros((4, 61), np.float32)] * 2)
    save(tmp_path / f"b{suffix}", "a model", windows, logits, 61)
    with pytest.raises(UserError, match=f"{token}.* 61"):
        SavedBase(tmp_path / f"b{suffix}")
