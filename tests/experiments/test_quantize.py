"""Files in other GGUF types: read back by `gguf.quants`, whose readers we did not write."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from qwen_jax import opening
from qwen_jax.experiments import quantize
from qwen_jax.weights import kquant_encoding as kquants
from qwen_jax.weights.loader import open_checkpoint
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf
from tests.weights.gguf_bytes import TOKENIZER

# Of normally distributed weights, the error of rounding to the nearest of a grid of n bits that
# spans +- 2.5 sigma (the largest of 32) or a little more, relative to the weights' norm:
# step / sqrt(12) = 5 / (2^n - 1) / 3.46.
BITS = {Type.Q6_K: 6, Type.Q5_K: 5, Type.Q4_K: 4, Type.IQ4_NL: 4, Type.Q3_K: 3, Type.Q2_K: 2}


@pytest.mark.parametrize("kind", kquants.ENCODERS, ids=lambda kind: kind.name)
def test_k_quants_are_near_what_they_encode(kind: Type) -> None:
    values = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    values[3] = 0
    values[5] *= 1e-3
    values[7] = np.abs(values[7])
    back = gguf.quants.dequantize(kquants.encode(values, kind), kind)
    error = np.linalg.norm(back - values) / np.linalg.norm(values)
    assert error < 1.3 * 5 / (2 ** BITS[kind] - 1) / 12**0.5
    assert np.all(back[3] == 0)
    rows = np.linalg.norm(back - values, axis=1)[[5, 7]]
    assert np.all(rows < 1.5 * error * np.linalg.norm(values[[5, 7]], axis=1))


@pytest.mark.parametrize("kind", kquants.ENCODERS, ids=lambda kind: kind.name)
def test_what_lies_on_the_grid_stays(kind: Type) -> None:
    """Encoding what has been read again changes it by far less than the first time."""
    values = np.random.default_rng(1).standard_normal((8, 256)).astype(np.float32)
    once = gguf.quants.dequantize(kquants.encode(values, kind), kind)
    twice = gguf.quants.dequantize(kquants.encode(once, kind), kind)
    assert np.linalg.norm(twice - once) < 0.35 * np.linalg.norm(once - values)


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q5_K"])
def test_files(tmp_path: Path, kind: str) -> None:
    source = opening.locate()
    path = quantize.made(source, kind, tmp_path)
    assert quantize.made(source, kind, tmp_path) == path
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(path)
    for name, field in old.fields.items():
        if not name.startswith("GGUF."):
            assert new.fields[name].contents() == field.contents(), name
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert (before.name, *before.shape) == (after.name, *after.shape)
        wanted = kind if len(before.shape) > 1 else "F32"
        assert after.tensor_type.name == wanted
        if kind in ("F32", "Q8_0"):  # The source is Q8_0: nothing is lost.
            values = (gguf.quants.dequantize(t.data, t.tensor_type) for t in (before, after))
            np.testing.assert_array_equal(*values)


def test_parts_behind_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    config, blobs, snapshot = tiny_config(), tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    parameters = random_parameters(config)
    write_gguf(blobs / "m.gguf", config, parameters, split_max_tensors=9, metadata=TOKENIZER)
    links = []
    for number, part in enumerate(sorted(blobs.iterdir())):
        links.append(snapshot / part.name)
        links[-1].symlink_to(part.rename(blobs / str(number)))
    path = quantize.made(links[0], "F32", tmp_path)
    assert path.name.startswith("m-00001-of-")
    whole, source = (open_checkpoint(file) for file in (path, links[0]))
    assert len(source.files.paths) > 1 and whole.files.paths == (path,)
    assert whole.tensors.keys() == source.tensors.keys()
    for other in (links[-1], snapshot):  # a later part, and the directory
        same = open_checkpoint(quantize.made(other, "F32", tmp_path))
        assert same.config == whole.config and same.tensors.keys() == whole.tensors.keys()
        assert same.metadata.keys() == whole.metadata.keys()


def test_rows_that_are_no_whole_blocks_get_more_bits() -> None:
    assert quantize.fitting(Type.Q4_K, (4, 512)) == Type.Q4_K
    assert quantize.fitting(Type.Q4_K, (4, 96)) == Type.Q8_0
    assert quantize.fitting(Type.Q4_K, (4, 65)) == Type.F16
    assert quantize.fitting(Type.Q4_K, (512,)) == Type.F32
