"""Keys and values in a precision of their own."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import api, choices
from qwen_jax.errors import UserError
from qwen_jax.experiments.models import Sizes, remaker
from qwen_jax.model.cache import bytes_per_token

TOKENS = list(range(300, 364))


def test_a_cache_of_fewer_bits() -> None:
    """A bfloat16 has 8 significant bits: what comes out is off by some 2^-8 of what rests on keys
    and values, and by far more than float32's rounding."""
    whole, half = api.load(slots=2), api.load(slots=2, cache_dtype="bfloat16")
    engine = half.engine
    assert engine.pages.dtype == jnp.bfloat16 and engine.weights.dtype == jnp.float32
    exact, rounded = whole.engine.logits(TOKENS), engine.logits(TOKENS)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 2**-6
    # As much memory holds twice as many tokens, where memory is what bounds them.
    assert 2 * bytes_per_token(engine.config, 2) == bytes_per_token(whole.config, 4)
    again = remaker(half)(Sizes(1, True)).engine
    assert again.spec.cache == jnp.bfloat16 and again.shapes.slots == 1


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    float32, bfloat16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
    with pytest.raises(UserError, match="cache_dtype is 'int8', but it must be one of float32, bf"):
        choices.cache_dtype_of("int8", float32, "auto")
    monkeypatch.setattr(choices, "device", lambda: types.SimpleNamespace(platform="gpu"))
    with pytest.raises(UserError, match="beside parameters in bfloat16, which no kernel serves"):
        choices.cache_dtype_of("float16", bfloat16, "auto")
    assert choices.cache_dtype_of("float16", bfloat16, "xla") == jnp.float16
    assert choices.cache_dtype_of("bfloat16", bfloat16, "auto") == bfloat16
    assert choices.cache_dtype_of(None, bfloat16, "auto") == bfloat16
