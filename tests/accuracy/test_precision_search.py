"""Precision search: what rounding does, greedy against brute force, an honest count."""

import functools
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.accuracy.measures.metrics import logit_metrics
from qwen_jax.accuracy.tensors.precision_search import (
    Evaluation,
    PrecisionSearch,
    Rounding,
    search_exhaustively,
    search_greedily,
    search_precision,
)
from qwen_jax.accuracy.traces.recording import Recorder
from qwen_jax.accuracy.traces.trace import AXES
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError
from qwen_jax.model.tap import intervening
from tests.engines import random_engine, random_tokens, relative
from tests.golden_cases import odd_config
from tests.numpy_reference import attention

CONFIG = odd_config(num_layers=1)
TOKENS = random_tokens(CONFIG, 24)
SEARCHED = ("q_proj", "k_proj", "attn_scores", "attn_residual", "ffn_act", "ffn_residual", "logits")


def engine() -> Engine:
    return random_engine(CONFIG)


@functools.cache
def evaluation() -> Evaluation:
    return Evaluation(engine(), TOKENS, tuple(AXES), "bfloat16")


@functools.cache
def searched(exhaustive: bool) -> PrecisionSearch:
    bound = 0.5 * search_precision(engine(), TOKENS, 1, operations=SEARCHED).rounded_kld
    return search_precision(engine(), TOKENS, bound, operations=SEARCHED, exhaustive=exhaustive)


def test_nothing_rounded_is_the_model() -> None:
    np.testing.assert_allclose(
        evaluation().truth,
        engine().logits(TOKENS),
        rtol=0,
        atol=1e-5 * np.abs(evaluation().truth).max(),
    )
    assert evaluation()(frozenset(AXES)) == 0


def test_rounded_logits_are_ml_dtypes() -> None:
    truth = evaluation().truth
    expected = truth.astype(ml_dtypes.bfloat16).astype(np.float32)
    found = evaluation().logits(frozenset(AXES) - {"logits"})
    np.testing.assert_array_equal(found, expected)
    kld = logit_metrics(expected, truth).mean_kld
    assert evaluation()(frozenset(AXES) - {"logits"}) == kld


def test_rounded_probabilities_are_those_attention_uses() -> None:
    """With all behind them kept, attn_out shows it: against float64 on rounded probabilities."""
    trace = Recorder(engine()).record(TOKENS)
    layer = {name[len("layers.0.") :]: x for name, x in trace.tensors.items() if "." in name}
    probs = layer["attn_probs"].astype(ml_dtypes.bfloat16).astype(np.float64)
    group = CONFIG.group_size
    out = np.einsum("tns,snh->tnh", probs, np.repeat(layer["v_proj"].astype(np.float64), group, 1))
    exact = attention(
        layer["q_rope"].astype(np.float64),
        layer["k_rope"].astype(np.float64).swapaxes(0, 1),
        layer["v_proj"].astype(np.float64).swapaxes(0, 1),
        np.tril(np.ones((len(TOKENS), len(TOKENS)), bool)),
    )
    assert relative(layer["attn_out"], exact.reshape(len(TOKENS), -1)) < 1e-5
    found = attn_out_with_rounded_probs()
    assert relative(found, out.reshape(len(TOKENS), -1)) < 1e-5
    assert relative(found, exact.reshape(len(TOKENS), -1)) > 1e-4


def attn_out_with_rounded_probs() -> np.ndarray:
    keep = jnp.array([name != "attn_probs" for name in AXES])
    with intervening(Rounding(tuple(AXES), "bfloat16", keep)):
        trace = Recorder(engine(), "layers.0.attn_out").record(TOKENS)
    return trace.tensors["layers.0.attn_out"]


def test_greedy_finds_as_small_a_set_as_brute_force() -> None:
    greedy, brute = searched(exhaustive=False), searched(exhaustive=True)
    assert greedy.reached and brute.reached
    assert 1 <= len(greedy.kept) == len(brute.kept) < len(SEARCHED)
    for found in (greedy, brute):
        assert found.kld <= found.bound < found.rounded_kld
        rounded = frozenset(SEARCHED) - set(found.kept)
        assert found.kld == pytest.approx(evaluation()(frozenset(AXES) - rounded), rel=1e-6)
    assert greedy.evaluations < brute.evaluations <= 2 ** len(SEARCHED)


def test_layers_can_be_searched_apart() -> None:
    config = odd_config(num_layers=2)
    found = search_precision(
        random_engine(config), TOKENS, 1, operations=("q_proj", "logits"), by_layer=True
    )
    assert found.operations == ("layers.0.q_proj", "layers.1.q_proj", "logits")
    assert found.kept == () and found.evaluations == 1


COSTS = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


@given(costs=COSTS, part=st.floats(0.01, 1.2))
def test_independent_costs_are_solved_exactly_and_counted(costs: list[float], part: float) -> None:
    """Where costs add up, taking the dearest first is optimal."""
    units = [f"op{i}" for i in range(len(costs))]
    calls: list[frozenset[str]] = []

    def evaluate(kept: frozenset[str]) -> float:
        calls.append(kept)
        return math.fsum(c for unit, c in zip(units, costs, strict=True) if unit not in kept)

    bound = part * math.fsum(costs)
    greedy = search_greedily(units, evaluate, bound)
    assert greedy.evaluations == len(calls) == len(set(calls))
    calls.clear()
    brute = search_exhaustively(units, evaluate, bound)
    assert brute.evaluations == len(calls) == len(set(calls))
    ordered = sorted(costs)
    fewest = next(k for k in range(len(costs) + 1) if math.fsum(ordered[: len(costs) - k]) <= bound)
    assert len(greedy.kept) == len(brute.kept) == fewest


def test_what_greedy_took_too_early_is_released() -> None:
    """'a' alone helps most, but 'b' and 'c' together do without it."""
    klds = {"": 9.0, "a": 5.0, "b": 6.0, "c": 6.5, "ab": 3.0, "ac": 4.0, "bc": 0.5, "abc": 0.1}
    found = search_greedily("abc", lambda kept: klds["".join(sorted(kept))], 1.0)
    assert found.kept == ("b", "c")
    assert [(step.operation, step.kept) for step in found.steps] == [
        *(("a", True), ("b", True), ("c", True)),
        ("a", False),
    ]


def test_an_overflow_is_never_under_the_bound() -> None:
    def evaluate(kept: frozenset[str]) -> float:
        return 0.0 if "down_proj" in kept else float("nan")

    for search in (search_greedily, search_exhaustively):
        found = search(("embed", "down_proj"), evaluate, 0.1)
        assert found.kept == ("down_proj",)
    unreachable = search_greedily(("embed",), lambda kept: 1.0, 0.1)
    assert not unreachable.reached and unreachable.kept == ("embed",)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="needs a model in float32"):
        search_precision(random_engine(CONFIG, dtype="bfloat16"), TOKENS, 1)
    with pytest.raises(UserError, match="no operation 'q'"):
        search_precision(engine(), TOKENS, 1, operations=("q",))
    with pytest.raises(UserError, match="2\\^20 sets"):
        search_precision(engine(), TOKENS, 1, exhaustive=True)
    with pytest.raises(UserError, match="dtype is 'int8'"):
        search_precision(engine(), TOKENS, 1, dtype="int8")
    with pytest.raises(UserError, match="bound is 0"):
        search_precision(engine(), TOKENS, 0)
    with pytest.raises(UserError, match="has 0 tokens"):
        search_precision(engine(), [], 1)
