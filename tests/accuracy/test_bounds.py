"""Bounds: never passed by honest arithmetic, and close enough to it to see what is not."""

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from qwen_jax.accuracy.bounds import Arithmetic, bound
from qwen_jax.accuracy.operations import OPERATIONS, Calls, Context
from qwen_jax.accuracy.rounding import UNIT, round_to
from tests.golden_cases import odd_config

CTX = Context(odd_config(), Calls.of([8]), np.arange(8))
F32 = Arithmetic()


def ratio(
    name: str,
    candidate: np.ndarray,
    inputs: list[np.ndarray],
    params: list[np.ndarray],
    arithmetic: Arithmetic = F32,
) -> float:
    """The largest error over its bound."""
    wide = [x.astype(np.float64) for x in inputs]
    weights = [p.astype(np.float64) for p in params]
    value = OPERATIONS[name](CTX, wide, weights)
    limit = bound(name, CTX, arithmetic, value, wide, [0.0] * len(wide), weights)
    return float((np.abs(candidate.astype(np.float64) - value) / limit).max())


def operands(n: int, seed: int, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(offset, 1, (8, n)), rng.normal(offset, 1, (64, n))
    return x.astype(np.float32), weight.astype(np.float32)


def summed_in_order(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Every product and partial sum rounded to float32, one after another: the worst of orders."""
    out = np.zeros((len(x), len(weight)), np.float32)
    for k in range(x.shape[1]):
        out += x[:, k : k + 1] * weight[:, k]
    return out


@settings(max_examples=25)
@given(st.integers(1, 600), st.integers(0, 10**6), st.sampled_from([0.0, 1.0, -30.0]))
def test_sums_in_any_sane_order_stay_within(n: int, seed: int, offset: float) -> None:
    x, weight = operands(n, seed, offset)
    assert ratio("o_proj", x @ weight.T, [x], [weight]) <= 1
    assert ratio("o_proj", summed_in_order(x, weight), [x], [weight]) <= 1


@pytest.mark.parametrize("n", [64, 896, 4864])
def test_tf32_is_seen_at_any_length(n: int) -> None:
    """The guaranteed bound gamma_n |W||x| would hide it from some 300 terms on."""
    x, weight = operands(n, 0)
    narrow = round_to(x, "tf32", np) @ round_to(weight, "tf32", np).T
    assert ratio("o_proj", narrow, [x], [weight]) > 3
    guaranteed = n * UNIT["float32"] * (np.abs(x) @ np.abs(weight).T).astype(np.float64)
    error = np.abs(narrow - x.astype(np.float64) @ weight.T.astype(np.float64))
    assert ((error / guaranteed).max() < 1) == (n > 300)


def test_tf32_is_within_rounding_where_it_was_asked_for() -> None:
    x, weight = operands(896, 1)
    narrow = round_to(x, "tf32", np) @ round_to(weight, "tf32", np).T
    assert ratio("o_proj", narrow, [x], [weight], Arithmetic(operand=UNIT["tf32"])) <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_of_16_bits_are_within_their_own_rounding(dtype: str) -> None:
    """And not within that of float32."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    x, weight = (a.astype(kind).astype(np.float32) for a in operands(256, 2))
    stored = (x @ weight.T).astype(kind)
    arithmetic = Arithmetic(storage=UNIT[dtype], cache=UNIT[dtype])
    assert ratio("o_proj", stored, [x], [weight], arithmetic) <= 1
    assert ratio("o_proj", stored, [x], [weight]) > 10


def test_attention_beside_a_float16_cache_is_within_its_rounding() -> None:
    """Of many slots that weigh the same, the rounding of the result is most of the error."""
    rng, config, slots = np.random.default_rng(), CTX.config, 900
    probs = np.full((8, config.num_heads, slots), 1 / slots)
    values = rng.normal(3, 1, (slots, config.num_kv_heads, config.head_dim)).astype(np.float16)
    exact = OPERATIONS["attn_out"](CTX, [probs, values.astype(np.float64)], [])
    arithmetic = Arithmetic(operand=UNIT["float16"], cache=UNIT["float16"])
    stored = exact.astype(np.float16)
    assert ratio("attn_out", stored, [probs, values], [], arithmetic) <= 1
    assert ratio("attn_out", stored, [probs, values], []) > 1


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_elementwise_operations_in_float32_stay_within(seed: int, exponent: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(0, 10**exponent, (8, 96)).astype(np.float32) for _ in range(2))
    weight = rng.normal(1, 0.3, 96).astype(np.float32)
    mean = (a * a).mean(-1, keepdims=True, dtype=np.float32)
    normed = a / np.sqrt(mean + np.float32(CTX.config.rms_eps)) * weight
    with np.errstate(over="ignore"):
        gated = a / (1 + np.exp(-a)) * b
    assert ratio("attn_norm", normed, [a], [weight]) <= 1
    assert ratio("attn_residual", a + b, [a, b], []) <= 1
    assert ratio("ffn_act", gated, [a, b], []) <= 1
    assert ratio("ffn_act", gated + np.float32(1e-5) * np.abs(gated), [a, b], []) > 1


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(-1, 2))
def test_softmax_in_float32_stays_within(seed: int, exponent: float) -> None:
    scores = np.random.default_rng(seed).normal(0, 10**exponent, (8, 6, 40)).astype(np.float32)
    scores[:, :, 30:] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    probs = weights / weights.sum(-1, keepdims=True)
    assert ratio("attn_probs", probs, [scores], []) <= 1
    flushed = np.where(probs < np.finfo(np.float32).tiny, 0, probs)
    assert ratio("attn_probs", flushed, [scores], []) <= 1
    assert ratio("attn_probs", probs.astype(ml_dtypes.bfloat16), [scores], []) > 1


def test_errors_of_inputs_are_propagated_as_independent_ones() -> None:
    """Against 400 draws: what goes in as three standard deviations comes out as three."""
    rng = np.random.default_rng(3)
    x, weight = (a.astype(np.float64) for a in operands(96, 4))
    sigma = 1e-3 * np.abs(rng.normal(size=x.shape))
    value = OPERATIONS["o_proj"](CTX, [x], [weight])
    limit = bound("o_proj", CTX, F32, value, [x], [3 * sigma], [weight])
    draws = np.array(
        [(x + sigma * rng.normal(size=x.shape)) @ weight.T - value for _ in range(400)]
    )
    np.testing.assert_allclose(3 * draws.std(axis=0), limit, rtol=0.25)
