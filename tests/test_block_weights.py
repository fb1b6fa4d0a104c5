"""Weights in blocks against the same weights as numbers, and against float64."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from jax import lax

from qwen_jax.engine import blocks, memory
from qwen_jax.engine.blocks import BlockWeights, Stacked, load_blocks, packed_bytes
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.form import Form, form_of
from qwen_jax.errors import UserError
from qwen_jax.model.decoder import matmul
from qwen_jax.weights.blocks import FORMATS, decode_into
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests.engines import Prompt, generate, random_tokens, relative
from tests.tiny_checkpoints import (
    encode,
    random_parameters,
    tiny_config,
    write_gguf,
    write_hf,
)

CONFIG = tiny_config()
FLOAT32 = jnp.dtype(jnp.float32)
KINDS = [*sorted(FORMATS), Type.F16, Type.BF16]
MIXED = {
    "embed_tokens": "Q8_0",
    "q_proj": "Q4_K",
    "k_proj": "Q5_0",
    "v_proj": "Q6_K",
    "o_proj": "IQ4_XS",
    "gate_proj": "Q3_K",
    "up_proj": "F32",
    "down_proj": "BF16",
}
"""The types of a model that mixes them, within one fused matrix too."""


def written(path: Path, types: str | Mapping[str, str]) -> Checkpoint:
    params = random_parameters(CONFIG)
    if not isinstance(types, str):
        types = {
            name: kind for name in params for part, kind in types.items() if f".{part}." in name
        }
    return open_checkpoint(write_gguf(path / "model.gguf", CONFIG, params, types=types).path)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return written(tmp_path_factory.mktemp("mixed"), MIXED)


@pytest.fixture(scope="module")
def both(mixed: Checkpoint) -> tuple[Engine, Engine]:
    """The expanded engine and the one in blocks."""
    return (
        Engine(CONFIG, load_parameters(mixed, jnp.float32)),
        Engine(CONFIG, load_blocks(mixed)),
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_and_products(kind: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no number of pieces divides, decoded as on the host, bit for bit."""
    rng = np.random.default_rng(0)
    rows, columns = 21, 512
    values = rng.normal(0, 0.05, (rows, columns)).astype(np.float32)
    raw, stored = encode(values, kind, rng)
    assert stored == kind
    raw = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
    expected = np.empty((rows, columns), np.float32)
    assert decode_into(raw, kind, expected)
    held = blocks.of_bytes(raw, kind, rows)
    tokens = np.array([[20, 0], [7, 7]])
    finite, looked_up = jax.jit(lambda w, ids: (w.finite(), w[ids]))(held, tokens)
    assert finite
    np.testing.assert_array_equal(blocks.expanded(held), expected)
    np.testing.assert_array_equal(looked_up, expected[tokens])

    monkeypatch.setattr(blocks, "PIECE", 4 * columns)
    x = rng.normal(size=(2, 3, columns)).astype(np.float32)
    found = jax.jit(lambda x, w: matmul(x, w, lax.Precision.HIGHEST))(x, held)
    assert relative(found, x.astype(np.float64) @ expected.T.astype(np.float64)) < 1e-6


def test_logits_and_text(both: tuple[Engine, Engine]) -> None:
    expanded, packed = both
    tokens = random_tokens(CONFIG, 600)
    assert relative(packed.logits(tokens), expanded.logits(tokens)) < 1e-5
    prompts = [Prompt(tokens[:500], 10), Prompt(tokens[500:517], 10)]
    assert generate(packed, prompts) == generate(expanded, prompts)


def test_parameters_are_the_expanded_ones(both: tuple[Engine, Engine], mixed: Checkpoint) -> None:
    expanded, packed = (engine.weights.parameters() for engine in both)
    assert sorted(packed) == sorted(expanded)
    for parameter in mixed.parameters:
        np.testing.assert_array_equal(packed[parameter.name], expanded[parameter.name])


def test_fused_matrices_keep_their_types(both: tuple[Engine, Engine]) -> None:
    weights = both[1].weights
    assert isinstance(weights, BlockWeights)
    assert weights.in_blocks and not both[0].weights.in_blocks
    fused = weights.named["layers.0.qkv_proj.weight"]
    assert isinstance(fused, Stacked)
    kinds = [source.kind for source in fused.sources if isinstance(source, blocks.Blocks)]
    assert kinds == [Type.Q4_K, Type.Q5_0, Type.Q6_K]


def test_size_is_what_the_arrays_take(both: tuple[Engine, Engine], mixed: Checkpoint) -> None:
    assert packed_bytes(mixed) == sum(x.nbytes for x in jax.tree.leaves(both[1].weights))


def test_damaged_blocks(tmp_path: Path) -> None:
    checkpoint = written(tmp_path, "Q8_0")
    info = checkpoint.tensors["blk.1.ffn_up.weight"]
    with info.path.open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\xff\xff")
    with pytest.raises(UserError, match=r"'blk\.1\.ffn_up\.weight' has values that are not finite"):
        load_blocks(open_checkpoint(checkpoint.path))


def test_rule_of_auto(mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, unless they take more than three quarters of what is free."""
    numbers = form_of("expanded", mixed, FLOAT32)
    expanded, packed = numbers.held, packed_bytes(mixed)
    assert packed is not None
    blocks = Form(packed, blocks=True)
    for free, form in ((expanded * 4 // 3 + 4, numbers), (expanded * 4 // 3 - 4, blocks)):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        assert form_of("auto", mixed, FLOAT32, texts=1) == form
    assert form_of("packed", mixed, FLOAT32) == blocks
    assert not form_of("auto", mixed, jnp.dtype(jnp.bfloat16)).blocks


def test_refusals(mixed: Checkpoint, tmp_path: Path) -> None:
    plain = open_checkpoint(write_hf(tmp_path / "hf", CONFIG, random_parameters(CONFIG)).path)
    with pytest.raises(UserError, match="has no matrices in blocks or in 16 bits"):
        form_of("packed", plain, FLOAT32)
    assert not form_of("auto", plain, FLOAT32).blocks
    with pytest.raises(UserError, match="blocks are decoded to float32, and dtype is bfloat16"):
        form_of("packed", mixed, jnp.dtype(jnp.bfloat16))


def test_what_does_not_fit(mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"in their blocks, but the cpu has 1\.0 kB free"):
        memory.check_weights_fit(CONFIG, FLOAT32, packed_bytes(mixed))
