"""What a certificate says of files that are no dump, and of what it has found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from qwen_jax.accuracy import certify
from qwen_jax.accuracy.certificate.table import at_most, text, what
from qwen_jax.errors import UserError
from tests.accuracy import other_engine
from tests.accuracy.certificate_room import CASE, TOKENS, room

__all__ = ["room"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            lambda whole: whole[:50],
            r"the header claims to end at .*; let who writes it end, or record",
        ),
        (
            lambda whole: whole[:-7],
            r"the file has only .*; let who writes it end, or record it again",
        ),
        (lambda whole: whole + b"xx", "2 bytes follow the last tensor; .* so record it again"),
        (
            lambda whole: b"GGUF" + whole,
            "a GGUF file, a model; let --model name it, and name a trace",
        ),
        (lambda whole: b"\x93NUMPY" + whole, "a NumPy array; name a trace or a dump"),
        (lambda whole: b"PK\x03\x04" + whole, "a zip archive; unpack it"),
        (lambda whole: safetensors.numpy.save({}), "no tensor in it; record it again"),
    ],
    ids=["header", "data", "more", "model", "array", "archive", "nothing"],
)
def test_files_that_are_no_dump_have_a_way_out(
    tmp_path: Path, room: Path, made: Callable[[bytes], bytes], said: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(made(safetensors.numpy.save({"logits": np.zeros((3, 4), np.float32)})))
    shutil.copy(room / "clean" / "mapping.json", tmp_path / "x.mapping.json")
    with pytest.raises(UserError, match=said) as error:
        certify(path, model=room / "model.gguf")
    assert "download" not in str(error.value) and "published" not in str(error.value)


@pytest.mark.parametrize(
    ("fraction", "said"),
    [
        (0.991, "1.00"),
        (1.0, "1.00"),
        (1.002, "1.002"),
        (1.04, "1.04"),
        (1.06, "1.1"),
        (123.4, "1.2e+2"),
        (1 + 2**-50, "1.000000000000001"),
        (np.inf, "inf"),
    ],
)
def test_what_exceeds_its_bound_is_seen_to(fraction: float, said: str) -> None:
    assert at_most(fraction) == said


def test_biases_of_one_product_are_told_as_its(tmp_path: Path, room: Path) -> None:
    config, params = CASE.config, CASE.parameters()
    without = {n: 0 * x if n.endswith("q_proj.bias") else x for n, x in params.items()}
    other_engine.dump(tmp_path / "dump", config, without, TOKENS)
    fields = json.loads((tmp_path / "dump" / "mapping.json").read_text())
    (tmp_path / "dump" / "mapping.json").write_text(json.dumps(fields | {"tokens": TOKENS}))
    found = certify(tmp_path / "dump", model=room / "model.gguf")
    (cause,) = found.engines[0].causes
    assert (cause.name, cause.operations) == ("zero_qkv_bias", ("q_proj",))
    assert (
        "biases are zero; seen in q_proj" in text(found)
        and "k_proj" not in what(cause).split(";")[1]
    )
