"""A pool of pages is in memory once: whatever program takes it writes into it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.layout import Layout
from qwen_jax.engine.rows import FIELDS
from qwen_jax.engine.sampling import Plan
from qwen_jax.engine.weights import PlainWeights
from qwen_jax.model.cache import create_pages
from qwen_jax.weights.names import parameters

CONFIG = ModelConfig(3, 64, 4, 2, 16, 128, 256, 4096, 1e6, 1e-6, True)
FLOAT = jnp.dtype(jnp.float32)
LAYOUT = Layout.of(CONFIG, FLOAT, "cpu", loaded=True, cache_tokens=32768)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def given(rows: int) -> tuple[Any, ...]:
    """The spec, and shapes of weights, pages and tables."""
    named = {p.name: jax.ShapeDtypeStruct(p.shape, FLOAT) for p in parameters(CONFIG, "gguf")}
    pages = jax.eval_shape(lambda: create_pages(CONFIG, LAYOUT.pages, FLOAT))
    return LAYOUT.spec, PlainWeights(named), pages, ints(rows, LAYOUT.table_width)


def assert_in_place(lowered: Any, pages: jax.ShapeDtypeStruct) -> None:
    memory = lowered.compile().memory_analysis()
    size = pages.size * pages.dtype.itemsize
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4


@pytest.mark.parametrize("rows", [1, 8])
def test_steps(rows: int) -> None:
    state = jax.eval_shape(lambda: steps.State.create(8))
    args = given(rows)
    packed = ints(rows, FIELDS)
    lowered = steps.step.lower(*args, state, None, packed, Plan(), 4)
    assert_in_place(lowered, args[2])


@pytest.mark.parametrize(("rows", "length"), [(1, 16), (1, 1), (4, 128)])
def test_pieces(rows: int, length: int) -> None:
    args = given(rows)
    lowered = steps.extend.lower(*args, ints(rows, length), ints(rows), ints(rows))
    assert_in_place(lowered, args[2])
