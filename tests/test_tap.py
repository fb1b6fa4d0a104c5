"""Named tensors: all recorded, each equal to float64, and the output untouched by recording."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen_jax.model.cache import PAGE, Cache
from qwen_jax.model.decoder import Qwen2
from qwen_jax.model.tap import intervening, recording, tap, watched
from tests.engines import device_parameters, random_tokens, relative
from tests.golden_cases import Case, odd_config
from tests.numpy_reference import forward

CONFIG = odd_config(num_layers=2)
LENGTH = 40

# DESIGN.md's names, in a layer's order.
LAYER_NAMES = [
    *("attn_norm", "q_proj", "k_proj", "v_proj", "q_rope", "k_rope", "attn_scores", "attn_probs"),
    *("attn_out", "o_proj", "attn_residual", "ffn_norm", "gate_proj", "up_proj", "ffn_act"),
    *("down_proj", "ffn_residual"),
]

# What an intervention may want besides: where the tokens stand, and what the cache holds.
STATE = {"tokens", "positions", "lengths", "cache_slots", "k_cache", "v_cache"}

Run = Callable[[bool], tuple[jax.Array, dict[str, jax.Array]]]


@pytest.fixture(scope="module")
def run() -> Run:
    """Logits of one text by a jitted call, with or without a recording."""
    model = Qwen2(CONFIG, device_parameters(Case(CONFIG, 0).parameters(), "float32"))
    graph, state = nnx.split(model)
    tokens = jnp.array([random_tokens(CONFIG, LENGTH)])
    start, lengths = jnp.zeros(1, jnp.int32), jnp.array([LENGTH])

    def logits(state: nnx.State) -> jax.Array:
        model = nnx.merge(graph, state)
        cache = Cache.create(CONFIG, 1, 64, jnp.dtype(jnp.float32))
        return model.logits(model(tokens, cache, start, lengths)[0])

    def recorded(state: nnx.State) -> tuple[jax.Array, dict[str, jax.Array]]:
        with recording() as record:
            return logits(state), record

    plain, traced = jax.jit(logits), jax.jit(recorded)
    return lambda record: traced(state) if record else (plain(state), {})


def test_every_name_is_recorded(run: Run) -> None:
    _, record = run(True)
    layers = [f"layers.{i}.{name}" for i in range(2) for name in LAYER_NAMES]
    expected = ["embed", *layers, "final_norm", "logits"]
    assert sorted(n for n in record if n.split(".")[-1] not in STATE) == sorted(expected)
    assert {n.split(".")[-1] for n in record} - {n.split(".")[-1] for n in expected} == STATE


def test_recorded_tensors_equal_float64(run: Run) -> None:
    exact = forward(CONFIG, Case(CONFIG, 0).parameters(), random_tokens(CONFIG, LENGTH))
    _, record = run(True)
    assert exact.keys() <= record.keys()
    for name, expected in exact.items():
        assert record[name].shape == (1, *expected.shape), name
        assert relative(record[name][0], expected) <= 1e-5, name


def test_scores_and_probabilities_equal_float64(run: Run) -> None:
    """Slots past the query's position are masked, the cache's empty ones included."""
    exact = forward(CONFIG, Case(CONFIG, 0).parameters(), random_tokens(CONFIG, LENGTH))
    _, record = run(True)
    group, causal = CONFIG.group_size, np.tril(np.ones((LENGTH, LENGTH), bool))[:, None]
    for i in range(CONFIG.num_layers):
        q, k = exact[f"layers.{i}.q_rope"], exact[f"layers.{i}.k_rope"].repeat(group, axis=1)
        scores = np.einsum("tnh,snh->tns", q, k) / np.sqrt(CONFIG.head_dim)
        ours = np.asarray(record[f"layers.{i}.attn_scores"][0])
        probs = np.asarray(record[f"layers.{i}.attn_probs"][0])
        assert ours.shape == probs.shape == (LENGTH, CONFIG.num_heads, PAGE)
        seen = np.broadcast_to(causal, scores.shape)
        assert (
            np.isneginf(ours[..., :LENGTH][~seen]).all() and np.isneginf(ours[..., LENGTH:]).all()
        )
        assert relative(ours[..., :LENGTH][seen], scores[seen]) <= 1e-5
        weights = np.exp(np.where(seen, scores, -np.inf))
        assert relative(probs[..., :LENGTH], weights / weights.sum(-1, keepdims=True)) <= 1e-5
        assert not probs[..., LENGTH:].any()


def test_recording_changes_no_bit_of_the_logits(run: Run) -> None:
    plain, nothing = run(False)
    traced, record = run(True)
    assert not nothing
    np.testing.assert_array_equal(plain, traced)
    np.testing.assert_array_equal(traced, record["logits"])


def test_tap_is_the_identity_outside_a_recording() -> None:
    x = jnp.ones(3)
    assert tap("x", x) is x
    with recording() as record:
        assert tap("x", x) is x
    assert tap("y", x) is x
    assert record == {"x": x}


def test_a_recording_ends_with_its_block_even_by_an_error() -> None:
    with pytest.raises(KeyError), recording() as record:
        raise KeyError("planted")
    tap("x", jnp.ones(1))
    assert record == {}


def test_the_inner_of_two_recordings_records() -> None:
    x = jnp.ones(1)
    with recording() as outer:
        with recording() as inner:
            tap("inner", x)
        tap("outer", x)
    assert list(inner) == ["inner"] and list(outer) == ["outer"]


def test_an_intervention_takes_a_tensors_place_and_is_recorded() -> None:
    x = jnp.ones(2)

    def double(name: str, x: jax.Array) -> jax.Array:
        return 2 * x if name == "x" else x

    with intervening(double), recording() as record:
        np.testing.assert_array_equal(tap("x", x), [2, 2])
        assert tap("y", x) is x
    np.testing.assert_array_equal(record["x"], [2, 2])
    assert tap("x", x) is x


def test_watched_says_whether_anything_looks() -> None:
    assert not watched()
    with recording():
        assert watched()
    with intervening(lambda name, x: x):
        assert watched()
    assert not watched()


def test_an_intervention_reaches_the_logits(run: Run) -> None:
    """Without the residual stream of layer 0 the logits differ; with the identity they don't."""
    model = Qwen2(CONFIG, device_parameters(Case(CONFIG, 0).parameters(), "float32"))
    tokens = jnp.array([random_tokens(CONFIG, LENGTH)])
    start, lengths = jnp.zeros(1, jnp.int32), jnp.array([LENGTH])
    graph, state = nnx.split(model)

    def logits(state: nnx.State) -> jax.Array:
        cache = Cache.create(CONFIG, 1, 64, jnp.dtype(jnp.float32))
        model = nnx.merge(graph, state)
        return model.logits(model(tokens, cache, start, lengths)[0])

    plain, _ = run(False)
    with intervening(lambda name, x: x):
        np.testing.assert_array_equal(jax.jit(lambda s: logits(s))(state), plain)
    with intervening(lambda name, x: 0 * x if name == "layers.0.ffn_residual" else x):
        assert relative(jax.jit(lambda s: logits(s))(state), plain) > 0.1
