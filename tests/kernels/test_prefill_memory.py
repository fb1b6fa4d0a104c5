"""What prefill of packed weights holds besides its cache, which only `make compile` can tell."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct, lax

from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.weights import pack
from qwen_jax.model.cache import StackedCache
from tests.kernels import hopper
from tests.tiny_checkpoints import canonical, random_parameters

CONFIG = ModelConfig(10, 256, 4, 2, 64, 512, 1024, 32768, 1e6, 1e-6, tied=True)
ROWS = 4


@pytest.mark.usefixtures("as_if_on_hopper")
def test_one_cache_is_enough() -> None:
    """Layers are written where they lie, and read there too; JAX 0.10 copies one at a time."""
    if not hopper.compiles():
        pytest.skip("JAX's CUDA plugin is not installed")
    how = {"precision": lax.Precision.HIGHEST, "implementation": "mosaic_gpu"}
    make = functools.partial(steps.make_model, CONFIG, **how)
    dtype = jnp.dtype(jnp.bfloat16)
    params = canonical(random_parameters(CONFIG, 0))
    weights, cache = jax.eval_shape(
        lambda: (
            pack(CONFIG, ((k, jnp.asarray(v)) for k, v in params.items()), dtype, "mosaic_gpu"),
            StackedCache.create(CONFIG, ROWS, 32768, dtype),
        )
    )
    last = ShapeDtypeStruct((ROWS, CONFIG.hidden_size), dtype)
    tokens, number = ShapeDtypeStruct((ROWS, 16), jnp.int32), ShapeDtypeStruct((), jnp.int32)
    lengths = ShapeDtypeStruct((ROWS,), jnp.int32)
    chunk = functools.partial(steps.prefill_chunk, make)
    held = hopper.temporary_bytes(chunk, weights, cache, last, tokens, number, lengths, donate=1)
    assert held < 0.12 * cache.layers.size * dtype.itemsize
