"""Packed weights: the same numbers in another order, and the engine runs the same on them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_step import HEAD, Packed, Plan, Shape, empty_tape, places, put
from qwen_jax.engine import Engine, Prompt
from qwen_jax.packed import pack
from tests.engines import device_parameters, generate
from tests.tiny_checkpoints import random_parameters, tiny_config

# Heads of 64 and matrices of whole tiles, as the kernel wants them.
CONFIG = tiny_config(
    num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=384,
    vocab_size=320, context_length=600,
)  # fmt: skip
SHAPE = Shape(2, 256, 4, 2, 64, 384, 320, 1e-6)


@pytest.mark.parametrize("blocks", [1, 3, 132])
def test_every_tile_has_one_place(blocks: int) -> None:
    plan = Plan(SHAPE, blocks)
    at = [plan.places(p)[0] + layer * plan.places(p)[1] for layer in range(2) for p in range(4)]
    every = np.concatenate([*at, plan.places(HEAD)[0]])
    assert np.array_equal(np.sort(every), np.arange(plan.tape_tiles))


@pytest.mark.parametrize("blocks", [1, 3, 132])
def test_a_block_reads_its_tape_in_order(blocks: int) -> None:
    plan = Plan(SHAPE, blocks)
    for phase in plan.phases:
        owners = phase.owner(np.arange(phase.tiles))
        assert np.all(np.diff(owners) >= 0)
        for block in range(blocks):
            run_of = np.flatnonzero(owners == block)
            assert run_of.tolist() == list(range(phase.first(block), phase.first(block + 1)))
        # No row of tiles is shared by more blocks than there are slots for.
        grid = owners.reshape(-1, phase.across)
        assert (grid[:, -1] - grid[:, 0]).max() + 1 == phase.slots


def test_the_layers_of_a_block_follow_each_other() -> None:
    plan = Plan(SHAPE, 3)
    first, last = (plan.places(p)[:, plan.phases[p].owner(np.arange(plan.phases[p].tiles)) == 1]
                   for p in (0, 3))  # fmt: skip
    assert first[0, 0] + first[1, 0] == last[0, -1] + 1


def test_what_is_put_on_the_tape_is_read_back() -> None:
    plan, rng = Plan(SHAPE, 7), np.random.default_rng()
    matrices = {
        (phase, layer): jnp.asarray(rng.standard_normal(SHAPE.matrices[phase]), jnp.float32)
        for phase, layer in [(p, i) for p in range(4) for i in range(2)] + [(HEAD, 0)]
    }
    tape, where = empty_tape(plan, jnp.dtype(jnp.float32)), places(plan)
    for (phase, layer), value in matrices.items():
        tape = put(tape, where[phase], value, layer)
    packed = Packed(tape, jnp.zeros((2, SHAPE.qkv)), jnp.zeros((5, SHAPE.hidden)), where)
    for (phase, layer), value in matrices.items():
        assert np.array_equal(packed.matrix(plan, phase, layer), value)
    for row in (0, 63, 64, 319):
        assert np.array_equal(packed.head_row(plan, jnp.asarray(row)), matrices[HEAD, 0][row])


@pytest.mark.parametrize("tied", [True, False])
def test_the_engine_decodes_the_same_on_packed_weights(tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tied=tied)
    params = device_parameters(random_parameters(config, 5), "float32")
    packed = pack(config, params.items(), jnp.dtype(jnp.float32), "xla")
    back = packed.parameters()
    assert back.keys() == params.keys()
    assert all(np.array_equal(back[name], value) for name, value in params.items())

    rng = np.random.default_rng(5)
    prompt = Prompt(rng.integers(0, config.vocab_size, 530).tolist(), 40)
    plain, on_tape = Engine(config, params), Engine(config, packed)
    expected, got = (generate(engine, [prompt], logprobs=True) for engine in (plain, on_tape))
    assert got.tokens == expected.tokens
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)
