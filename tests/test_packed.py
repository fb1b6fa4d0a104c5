"""Packed weights: the same numbers in another order, and the engine runs the same on them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels.decode_step import (
    GATE_UP,
    HEAD,
    MOST_ROWS,
    ModelShape,
    Packed,
    StepPlan,
    empty_stream,
    tile_offsets,
)
from pallas_kernels.decode_step.packed.plan import DOWN, Phase
from qwen_jax.config import ModelConfig
from qwen_jax.engine import weights as packed_module
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Plan
from qwen_jax.engine.steps import State
from qwen_jax.engine.weights import PackedWeights, PlainWeights, pack, read_back
from qwen_jax.model.cache import NOBODY, Cache
from tests.engines import (
    Prompt,
    device_parameters,
    fill,
    generate,
    reshape,
    rows_of,
    run_steps,
)
from tests.kernels.streams import anything, matrices, put, same
from tests.tiny_checkpoints import random_parameters, tiny_config

# Heads of 64 and matrices of whole tiles, as the kernel wants them; but for the feed-forward's,
# which it pads.
CONFIG = tiny_config(
    num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=330,
    vocab_size=320, context_length=600,
)  # fmt: skip
SHAPES = {
    "small": ModelShape(2, 256, 4, 2, 64, 384, 320, 1e-6),
    # 23 tiles across: more than a part may have, and no parts of one length.
    "wide": ModelShape(2, 256, 4, 2, 64, 2944, 320, 1e-6),
}
# With 7, one block has no part of the small shape's down projection; 132 are too many.
PLANS = [
    StepPlan.uniform(shape, blocks, "float32")
    for shape in SHAPES.values()
    for blocks in (1, 3, 7, 132)
]
every_plan = pytest.mark.parametrize(
    "plan", PLANS, ids=[f"{name}, {blocks}" for name in SHAPES for blocks in (1, 3, 7, 132)]
)


def tiles_of(phase: Phase, block: int) -> np.ndarray:
    """The numbers of a block's tiles, in the order it reads them; a matrix counts row by row."""
    m_tiles = np.arange(phase.first[block], phase.first[block] + phase.count[block])
    part = phase.part[block]
    columns = np.arange(phase.part_begin[part], phase.part_begin[part + 1])
    return (m_tiles[:, None] * phase.across + columns).ravel()


def test_the_plans_hold_what_is_hard_about_parts() -> None:
    down = [plan.phases[DOWN] for plan in PLANS]
    assert [phase.parts > 1 for phase in down] == 2 * [False, True, True, True]
    assert any(len(set(np.diff(phase.part_begin))) > 1 for phase in down)
    assert any((phase.count == 0).any() for phase in down)


@every_plan
def test_every_tile_is_the_work_of_one_block(plan: StepPlan) -> None:
    for phase in plan.phases:
        every = np.concatenate([tiles_of(phase, block) for block in range(plan.blocks)])
        assert np.array_equal(np.sort(every), np.arange(phase.m_tiles * phase.across))


@every_plan
def test_a_block_reads_its_stream_in_order(plan: StepPlan) -> None:
    """Layer after layer, then the head, without a gap; then comes the next block."""
    places = [(phase, layer) for layer in range(plan.shape.layers) for phase in range(HEAD)]
    end = 0
    for block in range(plan.blocks):
        read = [
            plan.at(phase, layer).ravel()[tiles_of(plan.phases[phase], block)]
            for phase, layer in [*places, (HEAD, 0)]
        ]
        tiles = np.concatenate(read)
        assert np.array_equal(tiles, np.arange(end, end + len(tiles)))
        assert len(tiles) == 0 or tiles[0] == plan.starts[0, block]
        end += len(tiles)
    assert end == plan.stream_shape[0]


@every_plan
def test_what_is_put_into_the_stream_is_read_back(plan: StepPlan) -> None:
    rng, shape = np.random.default_rng(), plan.shape
    right = {
        (phase, layer): rng.standard_normal(shape.matrices[phase], np.float32)
        for phase, layer in [(p, i) for p in range(HEAD) for i in range(2)] + [(HEAD, 0)]
    }
    stream, offsets = empty_stream(plan), tile_offsets(plan)
    for (phase, layer), value in right.items():
        stream = put(plan, stream, value, phase, layer)
    packed = Packed(stream, jnp.zeros((2, shape.qkv)), jnp.zeros((5, shape.hidden)), offsets)
    found = matrices(packed, plan)
    assert found.keys() == right.keys()
    for which, value in right.items():
        assert np.array_equal(found[which], value)
    look_up = jax.jit(lambda packed, tokens: packed.embeddings(plan, tokens))
    for tokens in ([0], [319, 15, 16, 7, 8, 319, 0, 64]):
        got = look_up(packed, np.array(tokens))
        assert np.array_equal(got, right[HEAD, 0][tokens])


SIZE_STEPS = {"bfloat16": 1, "float32": 1, "q8_0": 32, "q5_1": 32, "int4": 32}
"""Storages, and what the feed-forward's size is a multiple of."""


@settings(max_examples=8)
@given(
    stored=st.sampled_from([*SIZE_STEPS]),
    size=st.integers(1, 544),
    blocks=st.sampled_from([1, 5, 20]),
    seed=st.integers(0, 99),
)
def test_a_feed_forward_of_any_size_is_read_back(
    stored: str, size: int, blocks: int, seed: int
) -> None:
    """As it was, and what pads it in the stream are zeros."""
    step = SIZE_STEPS[stored]
    shape = dataclasses.replace(SHAPES["small"], layers=1, ffn=-(-size // step) * step)
    plan, rng = StepPlan.uniform(shape, blocks, stored), np.random.default_rng(seed)
    whole = dataclasses.replace(plan, shape=dataclasses.replace(shape, ffn=shape.packed_ffn))
    assert plan.stream_shape == whole.stream_shape
    # In a stream of something else.
    stream, right = empty_stream(plan) - 1, {}
    for phase in (GATE_UP, DOWN):
        given, right[phase] = anything(rng, stored, *shape.matrices[phase])
        stream = put(plan, stream, given, phase)
    packed = Packed(stream, stream, stream, tile_offsets(plan))

    @jax.jit
    def read(packed: Packed) -> list[jax.Array]:
        return [packed.matrix(p, n) for p in (plan, whole) for n in (GATE_UP, DOWN)]

    gate_up, down, all_gate_up, all_down = map(np.asarray, read(packed))
    assert same(gate_up, right[GATE_UP]) and same(down, right[DOWN])
    assert not all_down[:, shape.ffn :].any()
    for half in np.split(all_gate_up, 2):
        assert not half[shape.ffn :].any()


@pytest.mark.parametrize(
    ("phase", "shape"),
    [(GATE_UP, (767, 256)), (GATE_UP, (770, 256)), (GATE_UP, (512, 256)), (GATE_UP, (768, 128)),
     (DOWN, (255, 384)), (DOWN, (256, 256))],
)  # fmt: skip
def test_a_matrix_of_another_size_is_refused(phase: int, shape: tuple[int, int]) -> None:
    plan = PLANS[0]
    out, columns = plan.shape.matrices[phase]
    why = f"a matrix of {shape[0]} x {shape[1]} is not one of {out} x {columns}"
    with pytest.raises(ValueError, match=why):
        put(plan, empty_stream(plan), np.zeros(shape, np.float32), phase)


@functools.cache
def plain_and_packed(config: ModelConfig) -> tuple[dict[str, jax.Array], PackedWeights]:
    """The same float32 weights both ways, the packed ones for the kernel's reference."""
    params = device_parameters(random_parameters(config, 5), "float32")
    packed = pack(config, params.items(), jnp.dtype(jnp.float32), "xla")
    return params, packed


@pytest.mark.parametrize(
    ("tied", "sizes", "pieces"),
    [
        # The second ends first, the third in the middle of a call.
        (True, [(530, 18), (3, 5), (70, 13)], (1,)),
        (False, [(3, 5), (530, 18), (70, 13)], (1, 4)),
    ],
)
def test_the_engine_decodes_the_same_on_packed_weights(
    tied: bool, sizes: list[tuple[int, int]], pieces: tuple[int, ...]
) -> None:
    config = dataclasses.replace(CONFIG, tied=tied)
    params, packed = plain_and_packed(config)
    back = read_back(packed)
    assert back.keys() == params.keys() and not packed.in_blocks
    assert all(np.array_equal(back[name], value) for name, value in params.items())

    rng = np.random.default_rng(5)
    prompts = [Prompt(rng.integers(0, config.vocab_size, n).tolist(), more) for n, more in sizes]
    plain, on_stream = Engine(config, params), Engine(config, packed)
    for engine in (plain, on_stream):
        reshape(engine, pieces=pieces)
    expected, got = (generate(engine, prompts, logprobs=True) for engine in (plain, on_stream))
    assert got.tokens == expected.tokens
    for ours, theirs in zip(got.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    # Whole caches, but for nobody's page: a row that is done writes nothing.
    ours, theirs = (np.asarray(engine.pages)[:, NOBODY + 1 :] for engine in (on_stream, plain))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_the_cache_is_in_memory_once() -> None:
    """From the first piece on: whoever takes it writes into it."""
    engine = Engine(CONFIG, plain_and_packed(CONFIG)[1])
    pools = [engine.pages]
    tables = fill(engine, [[1, 2, 3]], 9)
    for position in (3, 4):
        pools.append(engine.pages)
        rows = rows_of([5], [position], limit=[4])
        run_steps(engine, tables, State.create(1), None, rows, Plan(), 1)
    assert all(pages.is_deleted() for pages in pools)
    assert not engine.pages.is_deleted()


def test_the_cache_may_have_another_dtype() -> None:
    _, packed = plain_and_packed(CONFIG)
    spec, one = Engine(CONFIG, packed).spec, jnp.ones(1, jnp.int32)
    logits = []
    for dtype in (jnp.float32, jnp.float16):
        cache = Cache.create(CONFIG, 1, 256, jnp.dtype(dtype))
        found, cache = jax.jit(packed.forward(spec, 1))(one, cache, one, one > 0)
        assert cache.pages.dtype == dtype
        logits.append(found)
    np.testing.assert_allclose(*logits, atol=1e-2)


def test_a_partial_rotation_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    part = dataclasses.replace(CONFIG, rope_dim=32)
    why = "it rotates whole heads, not 32 of 64 dimensions"
    assert packed_module.refusal(part, jnp.dtype(jnp.bfloat16)) == why
    assert packed_module.refusal(CONFIG, jnp.dtype(jnp.bfloat16)) is None
    monkeypatch.setattr(pallas_kernels.implementation, "device_refusal", lambda: None)
    pallas_kernels.choose.cache_clear()
    prepared = packed_module.prepare(part, [], jnp.dtype(jnp.bfloat16), "auto")
    assert isinstance(prepared, PlainWeights)
    with pytest.raises(pallas_kernels.UnsupportedError, match=why):
        packed_module.prepare(part, [], jnp.dtype(jnp.bfloat16), "mosaic_gpu")
    pallas_kernels.choose.cache_clear()


def test_more_rows_than_the_kernel_takes_multiply_with_the_stream() -> None:
    params, packed = plain_and_packed(CONFIG)
    assert packed.serves(MOST_ROWS)
    assert not packed.serves(MOST_ROWS + 1)
    prompts = [Prompt([i, 2 * i], 3) for i in range(MOST_ROWS + 1)]
    engines = (Engine(CONFIG, w, slots=MOST_ROWS + 1) for w in (params, packed))
    plain, on_stream = (generate(engine, prompts) for engine in engines)
    assert on_stream.tokens == plain.tokens
