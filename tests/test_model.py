"""The model's own arithmetic: matrix products in every dtype, norms, and a large stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qwen_jax.engine.engine import Engine
from qwen_jax.model.decoder import matmul
from tests.engines import (
    decoded_logprobs,
    device_parameters,
    random_engine,
    random_tokens,
    relative,
)
from tests.golden_cases import Case, odd_config
from tests.numpy_reference import forward, log_softmax
from tests.test_parity import FLOAT32_BOUND, rounding_bound

HIGHEST = lax.Precision.HIGHEST
ROWS, IN, OUT = 5, 300, 70


def product(
    scale: np.ndarray | float, dtype: str, x_dtype: str
) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """x [B, T, in], weight [out, in] and what `matmul` makes of them."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, ROWS, IN)) * scale, x_dtype)
    weight = jnp.asarray(rng.normal(size=(OUT, IN)) / IN**0.5, dtype)
    out = jax.jit(lambda x, w: matmul(x, w, HIGHEST))(x, weight)
    return np.asarray(x, np.float64), np.asarray(weight, np.float64), out


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_matmul_is_x_times_the_weight_transposed(dtype: str, bound: float) -> None:
    """bfloat16 is rounded once, at the end: half a unit in its last place."""
    x, weight, out = product(1.0, dtype, dtype)
    assert out.dtype == dtype and out.shape == (2, ROWS, OUT)
    assert relative(np.asarray(out, np.float64), x @ weight.T) <= bound


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e5, 1e20])
def test_float16_weights_take_activations_of_any_size(scale: float) -> None:
    """float16 ends at 65504 and has nothing below 6e-8; Qwen2.5's activations go further."""
    x, weight, out = product(scale, "float16", "float32")
    assert out.dtype == jnp.float32
    assert relative(out, x @ weight.T) <= 2**-11  # the activations' rounding


def test_float16_rows_do_not_share_a_scale() -> None:
    """A large row leaves a small one its digits, and a row of zeros stays zero."""
    scale = np.array([0, 1e-12, 1, 1e9, 1e-3])[:, None]
    x, weight, out = product(scale, "float16", "float32")
    expected = x @ weight.T
    np.testing.assert_array_equal(out[:, 0], 0)
    for row in range(1, ROWS):
        assert relative(out[:, row], expected[:, row]) <= 2**-11


def test_partial_rotation_of_scaled_positions() -> None:
    """12 of 32 dimensions turn, four times as slowly: 512 positions, in prefill and in decoding."""
    config = odd_config(num_layers=1, rope_dim=12, linear_factor=4.0)
    engine, tokens = random_engine(config, 1), random_tokens(config, 512)
    exact = forward(config, Case(config, 1).parameters(), tokens)["logits"]
    assert relative(engine.logits(tokens), exact) <= FLOAT32_BOUND
    decoded = decoded_logprobs(engine, tokens)
    assert relative(decoded, log_softmax(exact)) <= FLOAT32_BOUND
    for other in ({"rope_dim": 32}, {"linear_factor": 1.0}):
        wrong = dataclasses.replace(config, **other)
        short = forward(wrong, Case(config, 1).parameters(), tokens[:64])["logits"]
        assert relative(short, exact[:64]) > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_stream_beyond_float16(dtype: str) -> None:
    """Activations past 65504, as real checkpoints have in some layers: no inf, and no "!!!!"."""
    config = odd_config(num_layers=2)
    params = Case(config, 0).parameters()
    scaled = {k: v * np.float32(2**15) for k, v in params.items() if "up_proj" in k}
    params |= scaled
    tokens = random_tokens(config, 40)
    exact = forward(config, params, tokens)
    assert np.abs(exact["layers.0.ffn_act"]).max() > 65504
    assert np.abs(exact["layers.1.ffn_residual"]).max() > 65504
    logits = Engine(config, device_parameters(params, dtype)).logits(tokens)
    assert relative(logits, exact["logits"]) <= rounding_bound(config, dtype)
