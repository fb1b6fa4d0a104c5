"""Prefill of weights in blocks: like the step, it runs on the kernels, in the run's dtype."""

import functools

import jax
import jax.numpy as jnp
import pytest
from gguf.constants import GGMLQuantizationType
from jax import ShapeDtypeStruct

from pallas_kernels.decode_step import Packed, StepPlan, Stored
from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.weights import PackedWeights, Rows, plan_for
from qwen_jax.model.cache import PAGE

BFLOAT16 = jnp.dtype(jnp.bfloat16)
LAYERS = Stored("q4_k", "q4_k", "q6_k", "q5_0", "q4_k", "q6_k")


@pytest.mark.usefixtures("as_if_on_hopper")
@pytest.mark.parametrize("tied", [True, False])
def test_every_operation_takes_its_kernel(tied: bool) -> None:
    """Asked for by name, a kernel that can't serve a case is an error."""
    config = ModelConfig(2, 256, 4, 2, 64, 512, 1024, 32768, 1e6, 1e-6, tied)
    spec = Spec(config, BFLOAT16, BFLOAT16, implementation="mosaic_gpu")
    plan = plan_for(config, "bfloat16")
    plan = StepPlan(plan.shape, plan.blocks, (LAYERS,) * 2, "q6_k")

    def given(*shape: int, dtype: object = jnp.float32) -> ShapeDtypeStruct:
        return ShapeDtypeStruct(shape, dtype)

    packed = Packed(
        given(*plan.stream_shape, dtype=jnp.uint32),  # type: ignore[arg-type]
        given(2, plan.shape.qkv),  # type: ignore[arg-type]
        given(5, 256),  # type: ignore[arg-type]
        tuple(given(*x.shape, dtype=jnp.int32) for x in plan.tile_offsets),  # type: ignore[misc]
    )
    rows = Rows(given(1024, 144, dtype=jnp.uint8), GGMLQuantizationType.Q4_K)  # type: ignore[arg-type]
    embed = None if tied else rows
    weights = PackedWeights(packed, embed, config, plan, BFLOAT16, "mosaic_gpu")
    pages, row = given(4, 3, 2, PAGE, 64, dtype=BFLOAT16), given(1, dtype=jnp.int32)
    tables, tokens = given(1, 2, dtype=jnp.int32), given(1, PAGE, dtype=jnp.int32)
    logits = functools.partial(steps.logits.__wrapped__, spec)
    _, found = jax.eval_shape(logits, weights, pages, tables, tokens, row, row)
    assert found.shape == (1, PAGE, 1024)
