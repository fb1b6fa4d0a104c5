"""Bounds: never passed by honest arithmetic, and close enough to it to see what is not."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from qwen_jax.accuracy.exact.bounds import Arithmetic, bound
from qwen_jax.accuracy.exact.operations import OPERATIONS, Calls, Context
from qwen_jax.accuracy.exact.rounding import UNIT, round_to
from tests.golden_cases import odd_config

CTX = Context(odd_config(), Calls.of([8]), np.arange(8))
F32 = Arithmetic()


def ratio(
    name: str,
    candidate: np.ndarray,
    inputs: list[np.ndarray],
    params: list[np.ndarray],
    arithmetic: Arithmetic = F32,
    ctx: Context = CTX,
) -> float:
    """The largest error over its bound."""
    wide = [x.astype(np.float64) for x in inputs]
    weights = [p.astype(np.float64) for p in params]
    value = OPERATIONS[name](ctx, wide, weights)
    limit = bound(name, ctx, arithmetic, value, wide, [0.0] * len(wide), weights)
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


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(["float16", "bfloat16", "tf32"]))
def test_what_is_near_the_middle_of_two_numbers_may_become_either(seed: int, kind: str) -> None:
    """An operand that is itself known only so well; elsewhere it is rounded to what it is."""
    rng = np.random.default_rng(seed)
    x, weight = (round_to(a.astype(np.float64), kind, np) for a in operands(96, seed))
    half = UNIT[kind] * np.exp2(np.floor(np.log2(np.abs(x))))
    known = np.where(np.arange(8)[:, None] < 4, x + half * np.sign(x), x)
    off = 1e-6 * np.abs(known)
    ctx = CTX.turned(operand=kind)
    engine = OPERATIONS["o_proj"](ctx, [known + rng.choice([-1, 1], x.shape) * off], [weight])
    value = OPERATIONS["o_proj"](ctx, [known], [weight])
    limit = bound("o_proj", ctx, F32, value, [known], [off], [weight])
    exact = bound("o_proj", ctx, F32, value, [known], [0.0], [weight])
    error = np.abs(engine - value)
    assert (error <= limit).all() and (error[:4] > exact[:4]).any()
    assert np.array_equal(limit[4:], exact[4:])


Angles = Callable[[np.ndarray, int, float], np.ndarray]


def by_power(position: np.ndarray, half: int, theta: float) -> np.ndarray:
    """transformers, vLLM, SGLang: 1 / theta ** (2 i / H), all in float32."""
    exponent = np.arange(half, dtype=np.float32) / np.float32(half)
    return position[:, None] * (np.float32(1) / np.float32(theta) ** exponent)


def by_negative_power(position: np.ndarray, half: int, theta: float) -> np.ndarray:
    """What JAX ports write: theta ** -(2 i / H), as exp2 of a product with log2."""
    exponent = np.arange(half, dtype=np.float32) / np.float32(half)
    return position[:, None] * np.exp2(-exponent * np.log2(np.float32(theta)))


def by_exponential(position: np.ndarray, half: int, theta: float) -> np.ndarray:
    """The first transformers': exp(2 i (-log theta / H))."""
    each = np.float32(-np.log(np.float32(theta)) / np.float32(2 * half))
    return position[:, None] * np.exp(np.arange(0, 2 * half, 2, dtype=np.float32) * each)


def pair_after_pair(position: np.ndarray, half: int, theta: float) -> np.ndarray:
    """llama.cpp on a CPU: the angle times theta ** (-2 / H), again and again."""
    scale = np.float32(theta) ** np.float32(-1 / half)
    found = [position]
    for _ in range(half - 1):
        found.append(found[-1] * scale)
    return np.stack(found, axis=1)


def by_power_of_the_step(position: np.ndarray, half: int, theta: float) -> np.ndarray:
    """llama.cpp on a GPU: the position times (theta ** (-2 / H)) ** i."""
    scale = np.float32(theta) ** np.float32(-1 / half)
    return position[:, None] * scale ** np.arange(half, dtype=np.float32)


WAYS = [by_power, by_negative_power, by_exponential, pair_after_pair, by_power_of_the_step]
POSITIONS = np.concatenate([np.arange(64), [73, 500, 4095, 9001, 20011, 32767]])


def rotated_by(angles: Angles, dtype: Any, head_dim: int, theta: float) -> float:
    """How far heads that are rotated so are off, of the bound."""
    config = dataclasses.replace(
        odd_config(), head_dim=head_dim, rope_dim=head_dim, rope_theta=theta
    )
    calls = Calls(POSITIONS, POSITIONS, POSITIONS + 1)
    ctx = Context(config, calls, np.zeros_like(POSITIONS))
    rng = np.random.default_rng()
    x = rng.normal(0, 3, (len(POSITIONS), 4, head_dim)).astype(dtype).astype(np.float32)
    phase = angles(POSITIONS.astype(np.float32), head_dim // 2, theta)[:, None]
    cos, sin = (f(phase).astype(dtype).astype(np.float32) for f in (np.cos, np.sin))
    a, b = np.split(x, 2, axis=-1)
    turned = [(u * cos).astype(dtype) + (v * sin).astype(dtype) for u, v in ((a, -b), (b, a))]
    found = np.concatenate(turned, axis=-1).astype(np.float32)
    unit = {"bfloat16": UNIT["bfloat16"], "float16": UNIT["float16"]}.get(np.dtype(dtype).name)
    arithmetic = Arithmetic(storage=unit, cache=unit) if unit else F32
    return ratio("q_rope", found, [x], [], arithmetic, ctx)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_however_angles_are_made_in_float32(way: Angles, dtype: Any) -> None:
    """Engines' own ways, at any position, of every size of head and theta."""
    for head_dim, theta in itertools.product((64, 128), (1e4, 5e5, 1e6)):
        assert rotated_by(way, dtype, head_dim, theta) <= 1


def off(theta_times: float = 1.0, narrow: str | None = None) -> Angles:
    def angles(position: np.ndarray, half: int, theta: float) -> np.ndarray:
        return round_to(by_power(position, half, theta * theta_times), narrow, np)

    return angles


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "wrong",
    [off(0.999), off(narrow="float16"), off(narrow="bfloat16"), off(narrow="tf32")],
    ids=["theta", "float16", "bfloat16", "tf32"],
)
def test_angles_that_are_none_of_those(wrong: Angles, head_dim: int) -> None:
    assert rotated_by(wrong, np.float32, head_dim, 1e6) > 3


@given(st.lists(st.floats(width=32), min_size=1), st.sampled_from([np.float32, np.float64]))
def test_float16_is_what_numpy_converts_to(values: list[float], wide: type) -> None:
    """Subnormal numbers, ties among them, overflow and the sign of zero."""
    near = np.array([*values, 2.0**-24 * 1.5, -(2.0**-25), 5.9e-8, 65519.9, 65520, -0.0], wide)
    for x in (near, (near * 1e-5).astype(wide)):
        with np.errstate(over="ignore", invalid="ignore"):
            found, right = round_to(x, "float16", np), x.astype(np.float16).astype(wide)
        np.testing.assert_array_equal(found, right)
        numbers = ~np.isnan(right)
        np.testing.assert_array_equal(np.signbit(found)[numbers], np.signbit(right)[numbers])
