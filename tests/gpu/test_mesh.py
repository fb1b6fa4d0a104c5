"""A model on two GPUs is the model on one, and its attention runs on each one's kernels."""

import functools

import jax
import pytest

import qwen_jax
from qwen_jax.engine.weights import PackedWeights
from tests.engines import relative

WORDS = ("river", "ship", "stone", "spring", "bridge", "forest", "rain", "clock")
"""Of each, float32 prefers every token by half a nat at least."""

pytestmark = pytest.mark.skipif(len(jax.devices()) < 2, reason="it needs two GPUs")


@functools.cache
def model(mesh: str | None, dtype: str, implementation: str = "auto") -> qwen_jax.Model:
    return qwen_jax.load(mesh=mesh, dtype=dtype, implementation=implementation, slots=8)


def haikus(made: qwen_jax.Model) -> list[str]:
    prompts = [f"haiku: {word}" for word in WORDS]
    return [completion.text for completion in made.generate(prompts, max_tokens=40)]


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_haikus(mesh: str, dtype: str) -> None:
    assert haikus(model(mesh, dtype)) == haikus(model(None, "float32", "xla"))


def test_logits() -> None:
    """As tests/mesh has them on CPUs: float32 rounds its sums anew, bfloat16 once more each."""
    exact = model(None, "float32", "xla")
    tokens = exact.tokens("haiku: snow")
    theirs = exact.logits(tokens)
    assert relative(model("tp=2", "float32").logits(tokens), theirs) < 1e-6
    one, two = (
        relative(model(m, "bfloat16", "xla").logits(tokens), theirs) for m in (None, "tp=2")
    )
    assert two < 2**0.5 * one


def test_replicas_run_the_step_kernel() -> None:
    """Each on its own device, with weights as the kernel reads them."""
    both = model("dp=2", "bfloat16", "mosaic_gpu")
    engines = (both.engine, *both.engine.others)
    assert [type(engine.weights) for engine in engines] == [PackedWeights] * 2
    assert set().union(*(engine.weights.devices() for engine in engines)) == {*jax.devices()[:2]}
    assert haikus(both) == haikus(model(None, "float32", "xla"))


def test_the_step_kernel_is_for_one_device() -> None:
    with pytest.raises(qwen_jax.UserError, match="the decode step's kernel has all of a model on"):
        model("tp=2", "bfloat16", "mosaic_gpu")


def test_blocks_are_for_the_step_kernel() -> None:
    with pytest.raises(qwen_jax.UserError, match="on a GPU only the decode step's kernel"):
        qwen_jax.load(mesh="tp=2", weights="packed")
