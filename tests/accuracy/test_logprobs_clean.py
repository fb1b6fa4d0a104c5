"""The yardstick of log-probabilities on engines of other people's making: no alarm."""

from pathlib import Path

import numpy as np

from qwen_jax.accuracy.exact.forward import forward
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.logprobs.yardstick import RMS, WORST, noise
from qwen_jax.accuracy.measures.metrics import log_softmax
from qwen_jax.engine.engine import Engine
from tests.accuracy.clean_engines import Clean
from tests.engines import device_parameters

UNITS = {"float16": 1 / 8, "bfloat16": 1.0}


def test_transformers_is_within_the_rounding_of_each_arithmetic(tmp_path: Path) -> None:
    """Golden logits of a text, every token of the vocabulary taken for one that came."""
    clean = Clean("eager", "float32")
    tokens = list(clean.golden(tmp_path).header.tokens)
    exact, rough = (
        Engine(clean.case.config, device_parameters(clean.case.parameters(), dtype)).logits(tokens)
        for dtype in ("float32", "bfloat16")
    )
    source = CheckpointSource(clean.checkpoint(tmp_path))
    (truth,) = (log_softmax(x) for name, x in forward(source, tokens) if name == "logits")
    ours, narrow = log_softmax(exact), log_softmax(rough)
    own = float(np.sqrt(np.mean((ours - truth) ** 2) / np.mean((narrow - truth) ** 2)))
    unit = noise(exact, rough)[:, None] * (1 - np.exp(ours))
    for engine in ("eager", "sdpa"):
        for dtype, size in {"float32": own, **UNITS}.items():
            theirs = log_softmax(Clean(engine, dtype).golden(tmp_path).tensors["logits"])
            ratios = (theirs - ours) / (unit * size)
            rms, worst = np.sqrt(np.mean(ratios**2)), np.abs(ratios).max()
            assert rms < RMS and worst < WORST, (engine, dtype, rms, worst)
            assert rms > RMS / 8, (engine, dtype, rms)  # or a finer arithmetic would be named
