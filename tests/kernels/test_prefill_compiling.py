"""A prefill program has the same kernels in every layer, which only `make compile` can tell."""

import functools
import re

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


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
def test_what_xla_compiles_does_not_grow_with_layers() -> None:
    """Fusions that are the same but for their names are compiled once; the first layers' differ."""
    if not hopper.compiles():
        pytest.skip("JAX's CUDA plugin is not installed")
    few = fusions(8)
    assert few and len(fusions(12)) == len(few)


def fusions(layers: int) -> set[str]:
    """Of the compiled program, without names and places."""
    config = ModelConfig(layers, 256, 4, 2, 64, 512, 1024, 32768, 1e6, 1e-6, tied=True)
    dtype = jnp.dtype(jnp.bfloat16)
    spec = Spec(config, dtype, dtype, implementation="mosaic_gpu")
    weights = prepared_shapes(config, names.parameters(config, "gguf"), dtype, "mosaic_gpu")
    pages = ShapeDtypeStruct((2 * layers, 5, config.num_kv_heads, PAGE, config.head_dim), dtype)
    row, tables = ShapeDtypeStruct((4,), jnp.int32), ShapeDtypeStruct((4, 1), jnp.int32)
    tokens = ShapeDtypeStruct((4, PAGE // 2), jnp.int32)
    extend = functools.partial(steps.extend.__wrapped__, spec)
    text = hopper.compiled(extend, weights, pages, tables, tokens, row, row)
    bodies = dict(re.findall(r"^%?(\S+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    called = re.findall(r" fusion\(.*?calls=%?([\w.]+)", text)
    return {re.sub(r", metadata=\{[^}]*\}|%[\w.-]+", "", bodies[name]) for name in called}
