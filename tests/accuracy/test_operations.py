"""Parameters one at a time, rounding, and the table of operations against independent float64."""

from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen_jax.accuracy.exact.forward import forward
from qwen_jax.accuracy.exact.operations import Calls, Knobs
from qwen_jax.accuracy.exact.parameters import CheckpointSource, EngineSource, Weights
from qwen_jax.accuracy.exact.rounding import UNIT, round_to
from qwen_jax.accuracy.references import float64
from qwen_jax.accuracy.tensors.diagnosis import diagnose
from qwen_jax.accuracy.tensors.faults.fault import parse
from qwen_jax.accuracy.traces.trace import Trace, names
from qwen_jax.errors import UserError
from tests.engines import random_engine, random_tokens
from tests.golden_cases import CASES, Case, odd_config
from tests.numpy_reference import forward as reference
from tests.tiny_checkpoints import canonical, write_gguf

PARTIAL = Case(odd_config(num_layers=2, rope_dim=16, linear_factor=4.0), seed=6)


@pytest.mark.parametrize("name", [*CASES, "partial and linear"])
def test_forward_is_the_model_in_float64(name: str) -> None:
    case = CASES.get(name, PARTIAL)
    tokens = random_tokens(case.config, 40)
    source = EngineSource(random_engine(case.config, case.seed))
    ours = dict(forward(source, tokens))
    assert list(ours) == names(case.config)
    exact = reference(case.config, case.parameters(), tokens)
    for tensor, expected in exact.items():
        np.testing.assert_allclose(ours[tensor], expected, rtol=1e-10, atol=1e-11, err_msg=tensor)


ROPE_FAULTS = ["rope_whole_head", "rope_unscaled", "rope_part_of_head", "rope_interleaved"]


@pytest.mark.parametrize("name", ROPE_FAULTS)
def test_faults_of_a_partial_and_scaled_rotation_are_named(name: str) -> None:
    """The candidate is the truth with the fault in it."""
    (fault,) = parse(name, PARTIAL.config)
    source, tokens = EngineSource(random_engine(PARTIAL.config, PARTIAL.seed)), list(range(40))
    change = fault.fault.knobs(PARTIAL.config)[0]
    knobs = dict.fromkeys(fault.fault.operations, Knobs(**change))
    header = float64(source, tokens, dtype="float32", names="logits").header
    found = diagnose(Trace(header, dict(forward(source, tokens, None, knobs))), source)
    assert found.named == (name,) and not found.unknown


def test_a_whole_head_has_no_part_to_forget() -> None:
    for name in ("rope_whole_head", "rope_unscaled"):
        with pytest.raises(UserError, match=f"can't have the fault '{name}'"):
            parse(name, CASES["tied"].config)
    assert parse("rope_unscaled", CASES["yarn"].config)


def test_scores_and_probabilities_are_softmax_of_masked_products() -> None:
    case = CASES["tied"]
    tokens = random_tokens(case.config, 12)
    ours = dict(forward(EngineSource(random_engine(case.config, case.seed)), tokens))
    q, k = ours["layers.1.q_rope"], ours["layers.1.k_rope"]
    for t in range(12):
        for n in range(case.config.num_heads):
            kv = n // case.config.group_size
            row = np.array([q[t, n] @ k[s, kv] for s in range(t + 1)]) / case.config.head_dim**0.5
            scores, probs = (ours[f"layers.1.attn_{x}"][t, n] for x in ("scores", "probs"))
            np.testing.assert_allclose(scores[: t + 1], row, rtol=1e-12, atol=1e-12)
            assert np.isneginf(scores[t + 1 :]).all() and not probs[t + 1 :].any()
            np.testing.assert_allclose(probs[: t + 1], np.exp(row) / np.exp(row).sum(), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_is_decoded_one_parameter_at_a_time(tmp_path: Path, dtype: str) -> None:
    case = Case(CASES["untied"].config, 5)
    written = write_gguf(tmp_path / "model.gguf", case.config, case.parameters())
    source = CheckpointSource(written.path, dtype)
    rounded = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    for name, expected in canonical(written.parameters).items():
        held = expected if name.endswith("norm") else expected.astype(rounded)
        got = source.get(name)
        assert got.dtype == held.dtype
        np.testing.assert_array_equal(got, held, err_msg=name)


def test_weights_are_shown_by_operation() -> None:
    case = CASES["untied"]
    params = case.parameters()
    source = EngineSource(random_engine(case.config, case.seed))
    layer = Weights(source, 1)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight, bias = layer[name]
        np.testing.assert_array_equal(weight, params[f"model.layers.1.self_attn.{name}.weight"])
        np.testing.assert_array_equal(bias, params[f"model.layers.1.self_attn.{name}.bias"])
    for name in ("gate_proj", "up_proj", "down_proj"):
        np.testing.assert_array_equal(layer[name][0], params[f"model.layers.1.mlp.{name}.weight"])
    np.testing.assert_array_equal(Weights(source, None)["logits"][0], params["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_ml_dtypes_own(dtype: str) -> None:
    x = np.random.default_rng(0).normal(size=500) * 10.0 ** np.arange(-9, 6).repeat(34)[:500]
    with np.errstate(over="ignore"):
        expected = x.astype(np.float32).astype(dtype).astype(np.float64)
    ours = round_to(x.astype(np.float32).astype(np.float64), dtype, np)
    np.testing.assert_array_equal(ours, expected)
    traced = round_to(jnp.asarray(x, jnp.float32), dtype, jnp)
    np.testing.assert_array_equal(np.asarray(traced), expected)


def test_tf32_keeps_ten_bits_and_rounds_ties_to_even() -> None:
    step = 2.0**-10
    x = np.array([1 + step / 2, 1 + 3 * step / 2, 1 + 0.51 * step, -3.0, 0.0, np.inf])
    expected = [1, 1 + 2 * step, 1 + step, -3, 0, np.inf]
    np.testing.assert_array_equal(round_to(x, "tf32", np), expected)
    np.testing.assert_array_equal(round_to(jnp.asarray(x, jnp.float32), "tf32", jnp), expected)
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32).astype(np.float64)
    error = np.abs(round_to(values, "tf32", np) - values)
    assert (error <= UNIT["tf32"] * np.abs(values)).all() and error.any()


def test_calls_say_where_a_position_came_in() -> None:
    calls = Calls.of([3, 2, 1, 1])
    assert calls.position.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert calls.start.tolist() == [0, 0, 0, 3, 3, 5, 6]
    assert calls.stop.tolist() == [3, 3, 3, 5, 5, 6, 7]
    assert calls.decode.tolist() == [False] * 5 + [True] * 2
