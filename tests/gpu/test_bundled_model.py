"""The bundled model writes the same on a GPU's kernels, alone and in batches, as XLA in float32."""

import functools

import pytest

import qwen_jax
from qwen_jax.engine.weights import PackedWeights

WORDS = [
    "river", "ship", "stone", "spring", "bridge", "forest", "rain", "clock", "feather", "summer",
    "leaf", "flower", "mountain", "thunder", "window", "shadow", "road", "apple", "horse", "autumn",
]  # fmt: skip
"""Of each, float32 prefers every token by half a nat at least."""


@functools.cache
def haiku(dtype: str, implementation: str, rows: int) -> list[str]:
    model = qwen_jax.load(dtype=dtype, implementation=implementation, slots=rows)
    prompts = [f"haiku: {word}" for word in WORDS]
    return [
        completion.text
        for first in range(0, len(prompts), rows)
        for completion in model.generate(prompts[first : first + rows], max_tokens=40)
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 4, len(WORDS)])
def test_haiku(dtype: str, rows: int) -> None:
    texts = haiku("float32", "xla", len(WORDS))
    assert all(len(text.splitlines()) == 3 for text in texts)
    assert haiku(dtype, "auto", rows) == texts


def test_every_operation_has_a_kernel_for_it() -> None:
    """By name, so that none falls back to XLA unseen."""
    model = qwen_jax.load(dtype="bfloat16", implementation="mosaic_gpu", slots=4)
    assert isinstance(model.engine.weights, PackedWeights)
    assert haiku("bfloat16", "mosaic_gpu", 4) == haiku("float32", "xla", len(WORDS))


def test_a_haiku_held_to_its_form() -> None:
    """By masks at first, then let go: the same, beside answers that nobody would give."""
    model = qwen_jax.load(dtype="bfloat16", slots=len(WORDS))
    assert model.engine.layout.unmasked
    line = "[a-z',. -]+"
    form = qwen_jax.Constraint.regex(f"{line}\\n{line}\\n{line}")
    prompts = [f"haiku: {word}" for word in WORDS]
    for _ in range(2):
        found = model.generate(prompts, constraint=form, max_tokens=40)
        assert [one.text for one in found] == haiku("float32", "xla", len(WORDS))
    (agreement,) = model.engine.agreements.values()
    assert agreement.run > 100
    odd = model.generate(prompts, constraint=qwen_jax.Constraint.regex("[xyz]{20}"), max_tokens=40)
    assert all(set(one.text) <= set("xyz") and len(one.text) == 20 for one in odd)
