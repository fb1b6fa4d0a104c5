"""Comparison of a recorded run with float64 that is not ours, clean and with a planted error."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.accuracy.exact.parameters import EngineSource
from qwen_jax.accuracy.exact.replay import replay
from qwen_jax.accuracy.tensors.comparison import Comparison, compare
from qwen_jax.accuracy.traces.recording import Recorder
from qwen_jax.accuracy.traces.trace import Trace
from qwen_jax.errors import UserError
from qwen_jax.model.tap import intervening
from tests.engines import random_engine, random_tokens, relative
from tests.golden_cases import Case, odd_config
from tests.numpy_reference import forward

CONFIG = odd_config(num_layers=2)
TOKENS = random_tokens(CONFIG, 24)
HEADS, KV_HEADS = CONFIG.num_heads, CONFIG.num_kv_heads


@functools.cache
def recorded() -> Trace:
    return Recorder(random_engine(CONFIG)).record(TOKENS)


@functools.cache
def exact() -> Trace:
    """What tests/numpy_reference.py says; it has neither attn_scores nor attn_probs."""
    tensors = forward(CONFIG, Case(CONFIG, 0).parameters(), TOKENS)
    header = dataclasses.replace(recorded().header, implementation="NumPy")
    return Trace(header, tensors)


def cut(trace: Trace, start: int, stop: int) -> Trace:
    header = dataclasses.replace(trace.header, start=start, stop=stop)
    rows = {name: x[start:stop] for name, x in trace.tensors.items()}
    keyed = {n: x[..., :stop] if n.endswith(("scores", "probs")) else x for n, x in rows.items()}
    return Trace(header, keyed)


def judged(trace: Trace) -> Comparison:
    findings, _ = replay(trace, EngineSource(random_engine(CONFIG)))
    return compare(trace, exact(), findings)


def test_a_clean_run_is_within_rounding_everywhere() -> None:
    found = judged(recorded())
    assert [row.name for row in found.rows] == list(exact().tensors)
    assert {row.verdict for row in found.rows} == {"within rounding"}
    assert found.first is None
    assert found.missing == (
        *("layers.0.attn_probs", "layers.0.attn_scores"),
        *("layers.1.attn_probs", "layers.1.attn_scores"),
    )
    assert found.logits is not None and found.logits.max_kld < 1e-9
    for row in found.rows:
        expected = relative(recorded().tensors[row.name], exact().tensors[row.name])
        assert row.metrics.rms_rel == pytest.approx(expected), row.name


def test_profiles_are_rms_errors_of_positions_and_heads() -> None:
    """Summed up again, they give the whole tensor's."""
    found = compare(recorded(), exact())
    assert {row.verdict for row in found.rows} == {"not judged"}
    for row in found.rows:
        profile = found.by_position[row.name]
        assert profile.shape == (len(TOKENS),)
        assert np.sqrt(np.mean(profile**2)) == pytest.approx(row.metrics.rms_rel), row.name
    heads = {"q_proj": HEADS, "k_rope": KV_HEADS, "v_proj": KV_HEADS, "attn_out": HEADS}
    for name, count in heads.items():
        profile = found.by_head[f"layers.1.{name}"]
        assert profile.shape == (len(TOKENS), count)
        whole = found.by_position[f"layers.1.{name}"]
        np.testing.assert_allclose(np.sqrt(np.mean(profile**2, axis=1)), whole)
    assert "layers.0.o_proj" not in found.by_head


@pytest.fixture(scope="module")
def broken() -> Trace:
    """One head's rotated query is wrong in layer 1, from position 5 on."""

    def plant(name: str, x: jax.Array) -> jax.Array:
        if name != "layers.1.q_rope" or x.shape[1] == 1:
            return x
        return x.at[:, 5:, 3].multiply(1.5)

    with intervening(plant):
        return Recorder(random_engine(CONFIG)).record(TOKENS, chunk=len(TOKENS))


def test_the_first_fault_is_found_with_its_head_and_position(broken: Trace) -> None:
    found = judged(broken)
    assert found.first is not None
    assert (found.first.name, found.first.layer, found.first.position) == ("layers.1.q_rope", 1, 5)
    faulty = [row.name for row in found.rows if row.verdict == "fault"]
    assert faulty == ["layers.1.q_rope"]  # what follows only inherits it
    profile = found.by_head["layers.1.q_rope"]
    assert profile[5:, 3].min() > 0.1
    assert np.delete(profile, 3, axis=1).max() < 1e-5 and profile[:5].max() < 1e-5
    logits = found.rows[-1]
    assert logits.verdict == "within rounding" and logits.metrics.rms_rel > 1e-4


def test_a_nan_is_a_fault_without_a_replay() -> None:
    tensors = dict(recorded().tensors)
    tensors["layers.0.ffn_act"] = tensors["layers.0.ffn_act"].copy()
    tensors["layers.0.ffn_act"][7, 2] = np.nan
    found = compare(Trace(recorded().header, tensors), exact())
    assert found.first is not None
    assert (found.first.name, found.first.position) == ("layers.0.ffn_act", 7)
    assert np.isinf(found.by_position["layers.0.ffn_act"][7])


def test_only_common_positions_are_compared() -> None:
    found = compare(cut(recorded(), 4, 16), cut(recorded(), 0, 12))
    assert found.start == 4
    assert len(found.by_position["logits"]) == 8
    assert all(row.metrics.max_abs == 0 for row in found.rows)
    assert not found.missing


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match="no position in common"):
        compare(cut(recorded(), 0, 4), cut(recorded(), 8, 12))
    names = {"embed": recorded().tensors["embed"]}
    others = {"logits": recorded().tensors["logits"]}
    with pytest.raises(UserError, match="no tensor in common"):
        compare(Trace(recorded().header, names), Trace(recorded().header, others))
    tokens = (*TOKENS[:3], (TOKENS[3] + 1) % CONFIG.vocab_size, *TOKENS[4:])
    other = dataclasses.replace(recorded().header, tokens=tokens)
    with pytest.raises(UserError, match=f"token 3 is {TOKENS[3]} in"):
        compare(recorded(), Trace(other, recorded().tensors))


def test_bfloat16_is_counted_in_its_own_ulps() -> None:
    engine = random_engine(CONFIG, dtype="bfloat16")
    trace = Recorder(engine, "layers.0.attn_norm").record(TOKENS)
    (row,) = compare(trace, exact()).rows
    assert row.metrics.dtype == jnp.dtype(jnp.bfloat16).name
    assert 1 <= row.metrics.max_ulp <= 2
