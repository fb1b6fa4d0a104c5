"""Blocks that a GPU decodes, against the host's decoders, which gguf.quants checks elsewhere."""

import secrets
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES

from qwen_jax.weights import loader, on_device
from qwen_jax.weights.blocks import FORMATS, decode_into
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf
from tests.weights.test_blocks import assert_same, random_raw

SEED = secrets.randbits(31)
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", sorted(FORMATS), ids=lambda kind: kind.name)
def test_random_blocks_equal_the_hosts_to_the_bit(kind: Type, dtype: type) -> None:
    """Subnormal scales and values too, which XLA's CPU takes for zeros."""
    raw = random_raw(kind, 16 * 256, SEED)
    expected = np.empty((16, 256 * GGML_QUANT_SIZES[kind][0]), dtype)
    finite = decode_into(raw, kind, expected)
    out, place = jnp.zeros(expected.shape, dtype), np.array([0, 3], np.int32)
    got, bad = on_device.insert(out, jnp.int32(5), raw, place, kind)
    assert_same(np.asarray(got), expected)
    assert bad == (5 if finite else 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_plain_numbers_are_rounded_as_on_the_host(stored: type, dtype: type) -> None:
    bits = np.random.default_rng(SEED).integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    values = bits.view(stored)
    with np.errstate(all="ignore"):
        expected = values.astype(np.float32).astype(dtype)
    out, place = jnp.zeros(expected.shape, dtype), np.zeros(2, np.int32)
    got, _ = on_device.insert(out, jnp.int32(1), values, place, None)
    assert_same(np.asarray(got), expected)


def test_a_file_of_many_types_is_what_the_host_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tiny_config(tied=False)
    params = random_parameters(config, SEED)
    matrices = [name for name, value in params.items() if value.ndim == 2]
    kinds = [kind.name for kind in FORMATS] + ["F16", "BF16", "F32"]
    types = {name: kinds[i % len(kinds)] for i, name in enumerate(matrices)}
    path = write_gguf(tmp_path / "a.gguf", config, params, types=types, seed=SEED).path
    checkpoint = loader.open_checkpoint(path)
    assert loader.decodes_there(None) and loader.decodes_there(jax.local_devices()[0])
    monkeypatch.setattr(on_device, "PIECE", 9_000)
    there = loader.load_parameters(checkpoint, "bfloat16")
    monkeypatch.setattr(loader, "decodes_there", lambda _: False)
    here = loader.load_parameters(checkpoint, "bfloat16")
    for name, value in here.items():
        assert_same(np.asarray(there[name]), np.asarray(value))
