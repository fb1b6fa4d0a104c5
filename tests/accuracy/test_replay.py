"""Local replay: silent on clean runs, own errors apart from inherited ones, gaps bridged."""

import dataclasses

import numpy as np
import pytest

from qwen_jax.accuracy.exact.operations import schedule
from qwen_jax.accuracy.exact.replay import compare, replay
from qwen_jax.accuracy.traces.trace import Trace, split_name
from qwen_jax.errors import UserError
from tests.accuracy.planted_traces import CASE, LENGTH, source, trace


def without(names: set[str], base: Trace) -> Trace:
    """The trace without these tensors in any layer."""
    kept = {n: x for n, x in base.tensors.items() if split_name(n)[1] not in names}
    return Trace(base.header, kept)


def changed(name: str, index: tuple[int, ...], base: Trace, value: float) -> Trace:
    tensor = base.tensors[name].copy()
    tensor[index] = value
    return Trace(base.header, {**base.tensors, name: tensor})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_clean_runs_raise_no_alarm(dtype: str) -> None:
    findings, skipped = replay(trace(dtype=dtype), source(dtype))
    assert [(f.layer, f.operation) for f in findings] == schedule(CASE.config)
    assert not skipped
    assert max(f.residual.ratio for f in findings) <= 1, max(
        findings, key=lambda f: f.residual.ratio
    )


def test_one_wrong_element_is_the_only_finding() -> None:
    """Every later tensor was computed from the right one, so nothing else is wrong but its use."""
    wrong = changed("layers.1.gate_proj", (5, 7), trace(), 3.0)
    faulty = [f for f in replay(wrong, source())[0] if f.faulty]
    assert [(f.name, f.position, f.residual.worst) for f in faulty] == [
        ("layers.1.gate_proj", 5, (5, 7)),
        ("layers.1.ffn_act", 5, (5, 7)),
    ]


def test_missing_tensors_are_bridged_and_the_span_is_named() -> None:
    gone = {"attn_scores", "attn_probs", "ffn_norm", "gate_proj"}
    findings, _ = replay(without(gone, trace()), source())
    assert not [f for f in findings if f.faulty]
    spans = {f.operation: f.span for f in findings}
    assert spans["attn_out"] == ("attn_scores", "attn_probs", "attn_out")
    assert spans["up_proj"] == ("ffn_norm", "up_proj")
    assert spans["ffn_act"] == ("ffn_norm", "gate_proj", "ffn_act")
    assert spans["o_proj"] == ("o_proj",)


def test_a_whole_layer_may_be_missing_and_a_fault_in_it_is_still_seen() -> None:
    inner = {split_name(n)[1] for n in trace().tensors} - {"embed", "ffn_residual", "logits"}
    few = without(inner, trace())
    assert {split_name(n)[1] for n in few.tensors} == {"embed", "ffn_residual", "logits"}
    assert not [f for f in replay(few, source())[0] if f.faulty]
    wrong = without(inner, trace("rope_interleaved@1"))
    faulty = [f for f in replay(wrong, source())[0] if f.faulty]
    assert [f.name for f in faulty] == ["layers.1.ffn_residual"]


def test_without_the_first_positions_attention_cannot_be_judged() -> None:
    base = trace()
    header = dataclasses.replace(base.header, start=10)
    late = Trace(header, {n: x[10:] for n, x in base.tensors.items()})
    findings, skipped = replay(late, source())
    assert not [f for f in findings if f.faulty]
    assert sorted(skipped) == [f"layers.{i}.attn_{x}" for i in (0, 1) for x in ("out", "scores")]
    assert "positions 0 to 9" in skipped["layers.0.attn_out"]


def test_positions_are_those_of_the_text() -> None:
    base = changed("layers.0.ffn_norm", (20, 0), trace(), 9.0)
    header = dataclasses.replace(base.header, start=10)
    late = Trace(header, {n: x[10:] for n, x in base.tensors.items()})
    first = next(f for f in replay(late, source())[0] if f.faulty)
    assert (first.name, first.position) == ("layers.0.ffn_norm", 20)


def test_nan_and_infinity() -> None:
    one = np.ones(3)
    nan, inf = np.array([np.nan, 1, 1]), np.array([np.inf, 1, -np.inf])
    assert compare(nan, nan, one).ratio == 0 and compare(inf, inf, one).ratio == 0
    assert compare(nan, one, one).ratio == np.inf and compare(one, nan, one).ratio == np.inf
    assert compare(inf, -inf, one).ratio == np.inf
    assert compare(one + 0.5, one, one).ratio == 0.5
    poisoned = changed("layers.0.up_proj", (3, 3), trace(), np.nan)
    faulty = [f for f in replay(poisoned, source())[0] if f.faulty]
    assert [f.operation for f in faulty] == ["up_proj", "ffn_act"]


def test_a_trace_of_another_model_is_refused() -> None:
    base = trace()
    config = base.header.config | {"ffn_size": 112}
    header = dataclasses.replace(base.header, config=config)
    other = Trace(header, {"embed": base.tensors["embed"]})
    with pytest.raises(UserError, match="ffn_size is 112"):
        replay(other, source())
    assert base.header.stop == LENGTH
