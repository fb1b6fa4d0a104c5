"""What prefill of packed weights holds besides its cache, which only `make compile` can tell."""

import functools

import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct

from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.weights import prepared_shapes
from qwen_jax.model.cache import PAGE
from qwen_jax.weights import names
from tests.kernels import hopper

CONFIG = ModelConfig(10, 256, 4, 2, 64, 512, 1024, 32768, 1e6, 1e-6, tied=True)
ROWS = 4


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
def test_one_cache_is_enough() -> None:
    """Pages are written where they lie, and read there too."""
    if not hopper.compiles():
        pytest.skip("JAX's CUDA plugin is not installed")
    dtype, width = jnp.dtype(jnp.bfloat16), CONFIG.context_length // PAGE
    spec = Spec(CONFIG, dtype, dtype, implementation="mosaic_gpu")
    weights = prepared_shapes(CONFIG, names.parameters(CONFIG, "gguf"), dtype, "mosaic_gpu")
    shape = (2 * CONFIG.num_layers, 1 + ROWS * width, CONFIG.num_kv_heads, PAGE, CONFIG.head_dim)
    pages, row = ShapeDtypeStruct(shape, dtype), ShapeDtypeStruct((ROWS,), jnp.int32)
    tables, tokens = (ShapeDtypeStruct((ROWS, n), jnp.int32) for n in (width, PAGE))
    extend = functools.partial(steps.extend.__wrapped__, spec)
    held = hopper.temporary_bytes(extend, weights, pages, tables, tokens, row, row, donate=1)
    assert held < 0.12 * pages.size * dtype.itemsize
