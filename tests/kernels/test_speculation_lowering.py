"""Steps with drafts lower for CUDA as whole programs, through the decode step's kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct

from qwen_jax.engine import speculate as speculation
from qwen_jax.engine import steps
from qwen_jax.engine.layout import Layout
from qwen_jax.engine.rows import FIELDS
from qwen_jax.engine.sampling import PLANS, Plan
from qwen_jax.engine.speculate import Drafting, Lanes
from qwen_jax.engine.weights import PackedWeights, prepared_shapes
from qwen_jax.model.cache import create_pages
from qwen_jax.weights.names import parameters
from tests.kernels import hopper
from tests.test_packed import CONFIG

DTYPE = jnp.dtype(jnp.bfloat16)


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
@pytest.mark.parametrize(
    ("rows", "drafts", "plan", "by_model"),
    [(8, 8, Plan(), False), (64, 64, PLANS[1], False), (8, 1, PLANS[1], True)],
)
def test_steps_with_drafts_lower(rows: int, drafts: int, plan: Plan, by_model: bool) -> None:
    weights = prepared_shapes(CONFIG, list(parameters(CONFIG, "gguf")), DTYPE, "auto")
    assert isinstance(weights, PackedWeights)
    layout = Layout.of(CONFIG, DTYPE, "gpu", loaded=True, cache_tokens=8192, draft_tokens=7)
    shapes, vocab = layout.shapes, CONFIG.vocab_size
    spec, width = layout.spec, layout.table_width

    def ints(*dims: int) -> Any:
        return ShapeDtypeStruct(dims, jnp.int32)

    pages = jax.eval_shape(lambda: create_pages(CONFIG, layout.pages, DTYPE))
    state = jax.eval_shape(lambda: steps.State.create(shapes.slots))
    extras = jax.eval_shape(lambda: steps.Extras.create(shapes.slots, vocab))
    history = jax.eval_shape(lambda: speculation.create_history(layout))
    drafting = Drafting(7, plan.sampled, spec.without_tokenizer if by_model else None)

    def run(weights: Any, *given: Any) -> Any:
        step = speculation.speculate.__wrapped__
        return step(spec, weights, *given, plan, drafting, shapes.steps)

    text = hopper.lower(
        run,
        weights,
        pages,
        ints(rows, width),
        state,
        extras if plan.sampled else None,
        history,
        weights if by_model else None,
        pages if by_model else None,
        (ints(rows, FIELDS), Lanes._make([ints(rows), ints(rows), ints(drafts)])),
    )
    assert "mosaic_gpu" in text
    assert "decode_step" in text
