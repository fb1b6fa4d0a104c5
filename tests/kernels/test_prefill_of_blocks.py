"""Prefill of weights in blocks: like the step, it runs on the kernels, in the run's dtype."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from gguf.constants import GGMLQuantizationType
from jax import ShapeDtypeStruct

from pallas_kernels.decode_step import Packed, StepPlan, Stored
from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.packed_matrices import PackedMatrix
from qwen_jax.engine.packing import BlockRows
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.weights import PackedWeights, plan_for
from qwen_jax.model.cache import PAGE
from qwen_jax.model.tap import recording

BFLOAT16 = jnp.dtype(jnp.bfloat16)
LAYERS = Stored("q4_k", "q4_k", "q6_k", "q5_0", "q4_k", "q6_k")


CONFIG = ModelConfig(2, 256, 4, 2, 64, 512, 1024, 32768, 1e6, 1e-6, True)
SPEC = Spec(CONFIG, BFLOAT16, BFLOAT16, implementation="mosaic_gpu")


def given(*shape: int, dtype: Any = jnp.float32) -> Any:
    return ShapeDtypeStruct(shape, dtype)


def in_blocks(tied: bool) -> PackedWeights:
    """Weights as programs are compiled for."""
    config = dataclasses.replace(CONFIG, tied=tied)
    plan = plan_for(config, "bfloat16")
    plan = StepPlan(plan.shape, plan.blocks, (LAYERS,) * 2, "q6_k")
    offsets = tuple(given(*x.shape, dtype=jnp.int32) for x in plan.tile_offsets)
    stream = given(*plan.stream_shape, dtype=jnp.uint32)
    packed = Packed(stream, given(2, plan.shape.qkv), given(5, 256), offsets)
    embed = (
        None if tied else BlockRows(given(1024, 144, dtype=jnp.uint8), GGMLQuantizationType.Q4_K)
    )
    return PackedWeights(packed, embed, config, plan, BFLOAT16, "mosaic_gpu")


@pytest.mark.usefixtures("as_if_on_hopper")
@pytest.mark.parametrize("tied", [True, False])
def test_every_operation_takes_its_kernel(tied: bool) -> None:
    """Asked for by name, a kernel that can't serve a case is an error."""
    spec = dataclasses.replace(SPEC, config=dataclasses.replace(CONFIG, tied=tied))
    pages, row = given(4, 3, 2, PAGE, 64, dtype=BFLOAT16), given(1, dtype=jnp.int32)
    tables, tokens = given(1, 2, dtype=jnp.int32), given(1, PAGE, dtype=jnp.int32)
    logits = functools.partial(steps.logits.__wrapped__, spec)
    _, found = jax.eval_shape(logits, in_blocks(tied), pages, tables, tokens, row, row)
    assert found.shape == (1, PAGE, 1024)


def test_what_is_looked_into_has_the_numbers_that_it_declares() -> None:
    """The kernel's products make float16 of blocks, where a trace says bfloat16."""
    held: list[Any] = []

    def look(weights: PackedWeights) -> None:
        held.append(weights.model(SPEC).layers[1].mlp.down[...])
        with recording():
            held.append(weights.model(SPEC).layers[1].mlp.down[...])

    jax.eval_shape(look, in_blocks(True))
    used, looked_into = held
    assert isinstance(used, PackedMatrix)
    assert looked_into.dtype == BFLOAT16 and looked_into.shape == (256, 512)
