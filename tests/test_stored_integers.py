"""AWQ's and GPTQ's integers in the weight stream: scales and zero points as the files have them."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.form import load_packed, stored_plan
from qwen_jax.engine.weights import read_back
from qwen_jax.errors import UserError
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests.engines import random_tokens, relative
from tests.quantised_checkpoints import Quantise, Quantised, awq, gptq, write_quantised
from tests.tiny_checkpoints import random_parameters, tiny_config

FLOAT32 = jnp.dtype(jnp.float32)
# Heads of 64 and matrices of whole tiles, as the kernel wants them.
CONFIG = tiny_config(
    num_layers=1, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=384,
    vocab_size=320, context_length=600, tied=False,
)  # fmt: skip


def written(path: Path, method: str, bits: int, group_size: int, how: Quantise) -> Quantised:
    settings = {"quant_method": method, "bits": bits, "group_size": group_size}
    return write_quantised(path, CONFIG, random_parameters(CONFIG), how, settings)


def opened(path: Path, method: str, bits: int, group_size: int, how: Quantise) -> Checkpoint:
    return open_checkpoint(written(path, method, bits, group_size, how).path)


@pytest.mark.parametrize(
    ("method", "bits", "group_size", "how", "stored"),
    [
        ("awq", 4, 128, awq(4, 128), "int4"),
        ("awq", 8, 64, awq(8, 64), "int8"),
        ("gptq", 4, 32, gptq(4, 32), "int4"),
        ("gptq", 8, -1, gptq(8, -1, g_idx=False), "int8"),
        ("gptq", 3, 128, gptq(3, 128), "int4"),
    ],
)
def test_numbers_are_those_of_the_file(
    tmp_path: Path, method: str, bits: int, group_size: int, how: Quantise, stored: str
) -> None:
    checkpoint = opened(tmp_path, method, bits, group_size, how)
    plan = stored_plan(checkpoint, FLOAT32)
    assert plan is not None and plan.head == "float32"
    assert {*plan.layers[0]} == {stored}
    weights = load_packed(checkpoint, plan, FLOAT32, "xla")
    found, expanded = read_back(weights), load_parameters(checkpoint, jnp.float32)
    for name, value in expanded.items():
        np.testing.assert_array_equal(found[name], value)
    if stored == "int4" and method == "awq":
        tokens = random_tokens(CONFIG, 40)
        ours, theirs = (Engine(CONFIG, x).logits(tokens) for x in (weights, expanded))
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("method", "bits", "group_size", "how"),
    [
        # An input's group is any; scales that float16 doesn't have; 16 inputs a group.
        ("gptq", 4, 32, gptq(4, 32, act_order=True)),
        ("awq", 4, 32, awq(4, 32, scales="BF16")),
        ("gptq", 4, 16, gptq(4, 16)),
    ],
)
def test_what_blocks_would_change_is_expanded(
    tmp_path: Path, method: str, bits: int, group_size: int, how: Quantise
) -> None:
    assert stored_plan(opened(tmp_path, method, bits, group_size, how), FLOAT32) is None


def test_damaged_scales(tmp_path: Path) -> None:
    directory = written(tmp_path, "awq", 4, 128, awq(4, 128))
    name = "model.layers.0.mlp.down_proj.scales"
    scales = directory.tensors[name].copy()
    scales[1, 7] = np.inf
    directory.save(**{name.replace(".", "/"): scales})
    checkpoint = open_checkpoint(directory.path)
    plan = stored_plan(checkpoint, FLOAT32)
    assert plan is not None
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight' has values"):
        load_packed(checkpoint, plan, FLOAT32, "xla")
