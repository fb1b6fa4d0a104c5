"""Named tensors: all recorded, each equal to float64, and the output untouched by recording."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen_jax.cache import KVCache
from qwen_jax.model import Qwen2
from qwen_jax.tap import recording, tap
from tests.engines import device_parameters, random_tokens, relative
from tests.golden_cases import Case, odd_config
from tests.numpy_reference import forward

CONFIG = odd_config(num_layers=2)
LENGTH = 40

# DESIGN.md's names, in a layer's order; attn_scores and attn_probs come with the laboratory.
LAYER_NAMES = [
    *("attn_norm", "q_proj", "k_proj", "v_proj", "q_rope", "k_rope", "attn_out", "o_proj"),
    *("attn_residual", "ffn_norm", "gate_proj", "up_proj", "ffn_act", "down_proj", "ffn_residual"),
]

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
        cache = KVCache.create(CONFIG, 1, 64, jnp.dtype(jnp.float32))
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
    assert sorted(record) == sorted(expected)


def test_recorded_tensors_equal_float64(run: Run) -> None:
    exact = forward(CONFIG, Case(CONFIG, 0).parameters(), random_tokens(CONFIG, LENGTH))
    _, record = run(True)
    assert exact.keys() == record.keys()
    for name, expected in exact.items():
        assert record[name].shape == (1, *expected.shape), name
        assert relative(record[name][0], expected) <= 1e-5, name


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
