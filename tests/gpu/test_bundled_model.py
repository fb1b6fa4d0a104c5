"""The bundled model writes the same on a GPU, alone and in batches, as in float32 on XLA alone.

Its heads of 32 are served by no kernel of attention or of the whole step, so that this is what the
engine does where it has none.
"""

import functools

import pytest

import qwen_jax
from qwen_jax.engine.weights import PlainWeights

WORDS = [
    "snow", "rivers", "coffee", "fern", "train", "lamp", "winter", "bread", "garden", "window",
    "moon", "letter", "harbor", "bridge", "paper", "clock", "piano", "mountain", "street", "apple",
]  # fmt: skip
"""Of each, XLA in bfloat16 writes the same haiku on a CPU as in float32."""


@functools.cache
def haiku(dtype: str, implementation: str, rows: int) -> list[str]:
    model = qwen_jax.load(dtype=dtype, implementation=implementation, slots=rows)
    assert isinstance(model.engine.weights, PlainWeights)
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
