"""Blocks of a quantised file stay blocks on the devices of a mesh, and are the same numbers."""

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen_jax.engine.blocks import FLOAT32, Blocks, Stacked, load_blocks
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.form import form_of
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.split_blocks import SplitBlocks, load_split_blocks
from qwen_jax.engine.split_weights import splits_of
from qwen_jax.engine.texts import Text
from qwen_jax.mesh import MeshShape, part
from qwen_jax.model.split import Split
from qwen_jax.tasks.inspect import memory_lines
from qwen_jax.weights.checkpoint import Checkpoint, open_checkpoint
from tests.engines import relative
from tests.mesh.test_split import generated, small
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf

CONFIG = tiny_config(
    num_layers=1, hidden_size=64, num_heads=8, num_kv_heads=2, head_dim=16, ffn_size=96,
    vocab_size=312, tied=False,
)  # fmt: skip
"""Of o_proj's 128 inputs two devices have two blocks of 32 each, four one; of down_proj's 96 one
and a half, or less."""

TOKENS = [int(n) for n in np.random.default_rng(5).integers(0, 312, 40)]


@functools.cache
def file() -> Checkpoint:
    path = Path(tempfile.mkdtemp()) / "m.gguf"
    return open_checkpoint(write_gguf(path, CONFIG, random_parameters(CONFIG), types="Q8_0").path)


@functools.cache
def engine(tp: int) -> Engine:
    options = {"slots": 2, "cache_tokens": 512}
    if tp == 1:
        return small(Engine(CONFIG, load_blocks(file()), **options))
    (split,) = splits_of(MeshShape(tp=tp))
    assert isinstance(split, Split)
    return small(Engine(CONFIG, load_split_blocks(file(), split), split=split, **options))


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.hosts), 4])
def test_blocks_on_devices(tp: int) -> None:
    """Numbers, bytes and texts are those of one device; of four two have each key/value head."""
    one, several = engine(1), engine(tp)
    whole, dealt = one.weights.parameters(), several.weights.parameters()
    for name in whole:
        np.testing.assert_array_equal(dealt[name], whole[name], err_msg=name)
    assert isinstance(several.weights, SplitBlocks)
    named = several.weights.named
    blocks = {name for name, x in named.items() if isinstance(x, Blocks | Stacked)}
    matrices = ("qkv_proj", "o_proj", "gate_up_proj")
    assert blocks == {"embed", "lm_head", *(f"layers.0.{name}.weight" for name in matrices)}
    assert relative(several.logits(TOKENS), one.logits(TOKENS)) < 1e-6
    texts = [[Text(TOKENS[start:], 9) for start in (0, 20)] for _ in range(2)]
    found = generated(Scheduler(several), *texts[0]), generated(Scheduler(one), *texts[1])
    assert found[0] == found[1]


@pytest.mark.parametrize("tp", [2, 4])
def test_what_a_device_holds_is_foretold(tp: int) -> None:
    form = form_of("packed", file(), FLOAT32, mesh=MeshShape(tp=tp))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(engine(tp).weights))
    assert form.blocks and form.held == held
    assert form.cut == ("down_proj",)
    lines = memory_lines(part(CONFIG, tp), FLOAT32, 2, form, MeshShape(tp=tp))
    assert "  but where a device's part ends within one: down_proj, expanded" in lines
