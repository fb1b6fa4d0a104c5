"""The audit of GPTQ, AWQ and FP8: a second reading of the formats, and misreadings found by it."""

import pickle

import numpy as np
import pytest

from qwen_jax import opening
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.weights.audit import audit_weights
from qwen_jax.errors import UserError
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests.quantised_checkpoints import gptq, write_quantised
from tests.tiny_adapters import random_pairs, write_peft
from tests.tiny_checkpoints import canonical
from tests.weights.test_quantised_directories import CASES, CONFIG, GPTQ, PARAMS

READ = ("gptq-act-order", "gptq-cut-group", "gptq-v2", "gptq-int8", "gptq-int3", "awq", "awq-int8")
READ += ("fp8", "fp8-small-blocks", "fp8-powers-of-two", "fp8-matrix", "compressed-tensors")


@pytest.mark.parametrize("case", READ)
def test_what_is_loaded_is_right(tmp_path, case):
    settings, quantise = CASES[case]
    write_quantised(tmp_path, CONFIG, PARAMS, quantise, settings)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint = pickle.loads(pickle.dumps(checkpoint))  # as a process of its own gets it
    findings = audit_weights(checkpoint, load_parameters(checkpoint, "bfloat16"))
    assert {finding.verdict for finding in findings} == {"exact"}
    assert len(findings) == len(checkpoint.stored)


def test_zero_points_of_the_other_version(tmp_path):
    """What a reader of v1 as v2 holds: each of its values is one scale too high."""
    written = write_quantised(tmp_path / "v1", CONFIG, PARAMS, gptq(), GPTQ)
    v2 = write_quantised(
        tmp_path / "v2", CONFIG, PARAMS, gptq(), GPTQ | {"checkpoint_format": "gptq_v2"}
    )
    v2.save(**written.tensors)
    held = load_parameters(open_checkpoint(v2.path), "float32")
    found = {f.tensor: f.verdict for f in audit_weights(written.path, held)}
    assert {name for name, verdict in found.items() if verdict == "fault"} == {
        name for name in PARAMS if ".weight" in name and "proj" in name
    }


def test_the_truth_of_a_quantised_checkpoint(tmp_path):
    written = write_quantised(tmp_path, CONFIG, PARAMS, gptq(), GPTQ)
    source = CheckpointSource(tmp_path)
    for name, values in canonical(written.parameters).items():
        np.testing.assert_array_equal(source.get(name), values)


def test_adapters_are_not_audited(tmp_path):
    base = write_quantised(tmp_path / "base", CONFIG, PARAMS, gptq(), GPTQ)
    checkpoint = opening.open_model(base.path, write_peft(tmp_path / "a", random_pairs(PARAMS)))
    with pytest.raises(UserError, match="which an adapter changes; leave out one of the two"):
        audit_weights(checkpoint, load_parameters(checkpoint, "float32"))
