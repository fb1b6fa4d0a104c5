"""From the dumped tensors of an engine that is not ours to the causes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.tensors.diagnosis import Diagnosis, diagnose
from qwen_jax.accuracy.traces.foreign import open_trace
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


def test_the_documented_mapping_is_one(tmp_path: Path, source: CheckpointSource) -> None:
    page = Path(__file__).parents[2] / "docs" / "diagnose-another-engine.md"
    (block,) = re.findall(r"```json\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    other_engine.dump(
        tmp_path, CASE.config, CASE.parameters(), TOKENS, biases=True, interleaved=False
    )
    (tmp_path / "mapping.json").write_text(block)
    trace = open_trace(tmp_path, source.config, tokens=TOKENS)
    assert len(trace.tensors) == 2 + CASE.config.num_layers * (
        len(json.loads(block)["tensors"]) - 2
    )
    assert not diagnose(trace, source).faulty


def test_a_coarse_dump_names_the_layer(tmp_path: Path, source: CheckpointSource) -> None:
    """With the streams alone, a fault is one of what lies between two of them."""
    other_engine.dump(
        tmp_path, CASE.config, CASE.parameters(), TOKENS, biases=False, interleaved=False
    )
    names = ("embed", "layers.{i}.ffn_residual", "logits")
    fields = {"version": 1, "dtype": "float32"}
    fields["tensors"] = {name: other_engine.MAPPING[name] for name in names}
    (tmp_path / "mapping.json").write_text(json.dumps(fields))
    found = diagnose(open_trace(tmp_path, source.config, tokens=TOKENS), source)
    assert [f.layer for f in found.faulty] == [0, 1, 2]
    assert found.first is not None and "q_proj" in found.first.span
