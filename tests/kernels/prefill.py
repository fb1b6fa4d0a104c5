"""A prefill program of packed weights, by shapes alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import ShapeDtypeStruct

from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.weights import prepared_shapes
from qwen_jax.model.cache import PAGE
from qwen_jax.weights import names


def extending(
    config: ModelConfig, rows: int, width: int, length: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`steps.extend` in bfloat16 and its arguments, the pages second.

    Args:
        width: pages of a row's block table.
        length: tokens of each row.
    """
    dtype = jnp.dtype(jnp.bfloat16)
    spec = Spec(config, dtype, dtype, implementation="mosaic_gpu")
    weights = prepared_shapes(config, names.parameters(config, "gguf"), dtype, "mosaic_gpu")
    shape = (2 * config.num_layers, 1 + rows * width, config.num_kv_heads, PAGE, config.head_dim)
    pages, row = ShapeDtypeStruct(shape, dtype), ShapeDtypeStruct((rows,), jnp.int32)
    tables, tokens = (ShapeDtypeStruct((rows, n), jnp.int32) for n in (width, length))
    extend = functools.partial(steps.extend.__wrapped__, spec)
    return extend, (weights, pages, tables, tokens, row, row)
