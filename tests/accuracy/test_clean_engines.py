"""Clean engines raise no alarm: what transformers and llama.cpp computed once, without fault.

Eager attention and sdpa, heads of 64 and 128, theta of 1e4 and 1e6, positions from 0 and up to
32,767, float32, bfloat16 and float16; llama.cpp on files of every kind of operand.
"""

from pathlib import Path

import numpy as np
import pytest

from qwen_jax.accuracy.exact.parameters import CheckpointSource, Weights
from qwen_jax.accuracy.traces.trace import Trace
from qwen_jax.weights.loader import Checkpoint
from tests.accuracy.clean_engines import LLAMACPP, TRANSFORMERS, Clean

BY_NAME = {clean.name: clean for clean in (*TRANSFORMERS, *LLAMACPP)}


@pytest.mark.parametrize("name", BY_NAME)
def test_no_alarm(tmp_path: Path, name: str) -> None:
    clean = BY_NAME[name]
    found = clean.judged(tmp_path, lambda _: clean.golden(tmp_path))
    judged = {finding.operation for finding in found.findings}
    assert judged >= {"q_proj", "k_proj", "q_rope", "k_rope"} and not found.skipped
    assert clean.far or judged >= {"attn_out", "ffn_act", "logits"}
    assert not found.faulty and not found.causes, found.first


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K"])
def test_rounded_operands_hide_no_fault(tmp_path: Path, kind: str) -> None:
    """A bias left out of what llama.cpp multiplied in 8 bits."""
    clean = Clean("llamacpp", kind)

    def without_bias(checkpoint: Checkpoint) -> Trace:
        trace, tensors = clean.golden(tmp_path), {}
        weights = Weights(CheckpointSource(checkpoint), 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            tensor = trace.tensors[f"layers.0.{name}"]
            bias = weights[name][1].astype(np.float32).reshape(tensor.shape[1:])
            tensors[f"layers.0.{name}"] = tensor - bias
        return Trace(trace.header, {**trace.tensors, **tensors})

    found = clean.judged(tmp_path, without_bias)
    assert "zero_qkv_bias" in found.named
    (cause,) = (c for c in found.causes if c.fault.name == "zero_qkv_bias")
    assert cause.operations == ("q_proj", "k_proj", "v_proj")
