"""From the dumped tensors of an engine that is not ours to the causes."""

from pathlib import Path

import numpy as np
import pytest

from qwen_jax.accuracy.diagnosis import Diagnosis, diagnose
from qwen_jax.accuracy.foreign import open_trace
from qwen_jax.accuracy.parameters import CheckpointSource
from tests.accuracy import other_engine
from tests.golden_cases import CASES
from tests.tiny_checkpoints import write_gguf

CASE = CASES["tied"]
TOKENS = CASE.prompt()[:20]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CheckpointSource:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    return CheckpointSource(write_gguf(path, CASE.config, CASE.parameters()).path)


def examine(folder: Path, source: CheckpointSource, **faults: bool) -> Diagnosis:
    other_engine.dump(folder, CASE.config, CASE.parameters(), TOKENS, **faults)
    trace = open_trace(folder, source.config, tokens=TOKENS)
    assert all(x.dtype == np.float32 for x in trace.tensors.values())
    return diagnose(trace, source)


def test_both_faults_are_named_from_one_dump(tmp_path: Path, source: CheckpointSource) -> None:
    found = examine(tmp_path, source, biases=False, interleaved=True)
    assert found.named == ("zero_qkv_bias", "rope_interleaved")
    assert not found.unknown
    assert found.first is not None and found.first.operation == "q_proj"


@pytest.mark.parametrize("biases", [True, False])
def test_an_engine_is_blamed_for_nothing_else(
    biases: bool, tmp_path: Path, source: CheckpointSource
) -> None:
    found = examine(tmp_path, source, biases=biases, interleaved=False)
    assert found.named == (() if biases else ("zero_qkv_bias",))
    assert not found.unknown
    assert bool(found.first) is not biases
