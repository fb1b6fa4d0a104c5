"""Base files: ours read by safetensors, llama.cpp's byte by byte, damage refused."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qwen_jax.accuracy.distribution.base_file import METADATA, SavedBase, save, scored
from qwen_jax.errors import UserError
from tests.numpy_reference import log_softmax

CONTEXT, VOCAB = 9, 7
WINDOWS = np.arange(3 * CONTEXT, dtype=np.int32).reshape(3, CONTEXT) % VOCAB


def logits(seed: int = 0, scale: float = 3.0) -> list[np.ndarray]:
    """Of each window; 9 tokens have 9 - 1 - 9 // 2 = 4 scored positions."""
    rng = np.random.default_rng(seed)
    return [rng.normal(0, scale, (4, VOCAB)).astype(np.float32) for _ in WINDOWS]


def written(path: Path) -> Path:
    save(path, "a model", WINDOWS, iter(logits()), VOCAB)
    return path


def test_the_second_half_is_scored_but_its_last_token() -> None:
    assert list(range(8)[scored(8)]) == [4, 5, 6]
    assert list(range(9)[scored(9)]) == [4, 5, 6, 7]


def test_ours_is_a_safetensors_file_of_float32(tmp_path: Path) -> None:
    path = written(tmp_path / "b.safetensors")
    held = load_file(path)
    np.testing.assert_array_equal(held["windows"], WINDOWS)
    expected = log_softmax(np.stack(logits()))
    np.testing.assert_array_equal(held["logprobs"], expected.astype(np.float32))
    base = SavedBase(path)
    assert (base.name, base.vocab, base.exact) == ("a model", VOCAB, True)
    np.testing.assert_array_equal(base.windows, WINDOWS)
    np.testing.assert_array_equal(base.logprobs(1), held["logprobs"][1])


def test_theirs_is_llama_cpps_layout(tmp_path: Path) -> None:
    """Header, tokens, then a row of 4 + 8 uint16 for a vocabulary of 7."""
    data = written(tmp_path / "b.kld").read_bytes()
    assert data[:8] == b"_logits_"
    assert struct.unpack_from("<3i", data, 8) == (CONTEXT, VOCAB, 3)
    assert struct.unpack_from("<27i", data, 20) == tuple(WINDOWS.ravel())
    assert len(data) == 20 + 27 * 4 + 3 * 4 * (4 + 8) * 2
    expected = log_softmax(np.stack(logits()))
    at = 20 + 27 * 4
    for window in range(3):
        for position in range(4):
            scale, low = struct.unpack_from("<2f", data, at)
            steps = np.array(struct.unpack_from(f"<{VOCAB}H", data, at + 8))
            at += 24
            row = expected[window, position]
            assert scale == pytest.approx((row.max() - row.min()) / 65535)
            np.testing.assert_allclose(scale * steps + low, row, atol=scale * 0.51)


@given(st.integers(0, 1000), st.floats(0, 40))
def test_theirs_reads_back_to_half_a_step(
    tmp_path_factory: pytest.TempPathFactory, seed: int, scale: float
) -> None:
    path = tmp_path_factory.mktemp("base") / "b.kld"
    parts = logits(seed, scale)
    save(path, "", WINDOWS, iter(parts), VOCAB)
    base = SavedBase(path)
    assert not base.exact
    for i, part in enumerate(parts):
        row = log_softmax(part)
        clipped = np.maximum(row, row.max(-1, keepdims=True) - 16)
        np.testing.assert_allclose(base.logprobs(i), clipped, atol=0.51 * 16 / 65535)


def test_damage_is_refused(tmp_path: Path) -> None:
    theirs, ours = written(tmp_path / "b.kld"), written(tmp_path / "b.safetensors")
    for path in (theirs, ours):
        data = path.read_bytes()
        for kept in (0, 6, 15, len(data) - 1):
            path.write_bytes(data[:kept])
            with pytest.raises(UserError, match=str(path)):
                SavedBase(path)
    theirs.write_bytes(b"_logits_" + struct.pack("<3i", CONTEXT, -1, 3))
    with pytest.raises(UserError, match="damaged"):
        SavedBase(theirs)
    header = json.dumps({"__metadata__": {}}).encode()
    ours.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="neither a base"):
        SavedBase(ours)
    with pytest.raises(UserError, match="can't be read"):
        SavedBase(tmp_path / "absent")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = written(tmp_path / "b.kld")
    with pytest.raises(UserError, match="exists already"):
        written(path)


@pytest.mark.parametrize("name", ["b.kld", "b.safetensors"])
def test_an_interrupted_one_is_not_left_behind(name: str, tmp_path: Path) -> None:
    def interrupted() -> Iterator[np.ndarray]:
        yield logits()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / name, "a model", WINDOWS, interrupted(), VOCAB)
    assert not list(tmp_path.iterdir())


def test_metadata_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    save_file({"windows": np.zeros((1, 4), np.int32)}, path, metadata={METADATA: "[" * 100_000})
    with pytest.raises(UserError, match=r"b\.safetensors, its metadata: its JSON is nested too"):
        SavedBase(path)
