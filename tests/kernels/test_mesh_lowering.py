"""A mesh's programs for Hopper, lowered, and compiled where they can be: attention and sampling are
kernels on each device, and devices exchange what they must and no more."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import AbstractMesh, Mesh

from pallas_kernels.decode_step import Packed
from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.rows import FIELDS
from qwen_jax.engine.sampling import PLANS
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.split_packed import SplitPacked
from qwen_jax.engine.split_weights import SplitWeights
from qwen_jax.engine.steps import Extras, State
from qwen_jax.engine.weights import plan_for
from qwen_jax.model.cache import HEADS, PAGE, create_pages
from qwen_jax.model.decoder import dealt_axis
from qwen_jax.model.split import AXIS, Split
from qwen_jax.weights import names
from tests.kernels import hopper
from tests.mesh.eight import collectives

DTYPE = jnp.dtype(jnp.bfloat16)
CONFIG = ModelConfig(1, 3584, 28, 4, 128, 18944, 152064, 4 * PAGE, 1e6, 1e-6, False)
"""A layer of 7B."""
UNEVEN = ModelConfig(1, 8192, 64, 8, 128, 29568, 152064, 4 * PAGE, 1e6, 1e-6, False)
"""One of 72B, of whose feed-forward two devices have 115.5 tiles each."""

PAGES = 513
"""Of a pool larger than all else that a step needs."""


def mesh(tp: int) -> Split:
    """Of GPUs that needn't be there, or of none in particular where nothing can be compiled."""
    if (found := hopper.devices(tp)) is None:
        return Split(AbstractMesh((tp,), (AXIS,)))  # type: ignore[arg-type]
    return Split(Mesh(np.array(found), (AXIS,)))


def placed(split: Split, x: Any, axis: int | None = None) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(x.shape, x.dtype, sharding=split.sharding(axis))


def by_name(split: Split) -> Any:
    named = {
        p.name: placed(
            split,
            ShapeDtypeStruct(p.shape, jnp.float32 if p.keep_float32 else DTYPE),
            dealt_axis(p.name),
        )
        for p in names.parameters(CONFIG, "gguf")
    }
    return SplitWeights(named, CONFIG, split)


def packed(split: Split, stored: str = DTYPE.name, config: ModelConfig = CONFIG) -> Any:
    plan = plan_for(split.part(config), stored)
    granules, words = plan.stream_shape

    def shaped(dims: tuple[int, ...], dtype: Any, axis: int | None) -> ShapeDtypeStruct:
        return placed(split, ShapeDtypeStruct(dims, dtype), axis)

    stream = shaped((split.size * granules, words), jnp.uint32, 0)
    bias = shaped((1, split.size * plan.shape.qkv), jnp.float32, 1)
    norms = shaped((3, config.hidden_size), jnp.float32, None)
    offsets = tuple(shaped(x.shape, jnp.int32, None) for x in plan.tile_offsets)
    embed = shaped((config.vocab_size, config.hidden_size), DTYPE, 0)
    given = Packed(stream, bias, norms, offsets)  # type: ignore[arg-type]
    return SplitPacked(given, embed, config, plan, DTYPE, "mosaic_gpu", split)  # type: ignore[arg-type]


def lowered(
    split: Split,
    function: Callable[..., Any],
    *arguments: Any,
    weights: Callable[[Split], Any] = by_name,
    config: ModelConfig = CONFIG,
    **how: Any,
) -> Any:
    """For CUDA."""
    spec = Spec(config, DTYPE, DTYPE, valid_tokens=config.vocab_size, split=split)
    made = jax.eval_shape(lambda: create_pages(spec.cached, PAGES, DTYPE))
    others = jax.tree.map(functools.partial(placed, split), arguments)
    given = (weights(split), placed(split, made, HEADS), *others)
    program = jax.jit(functools.partial(function, spec, **how), donate_argnums=1)
    return program.trace(*given).lower(lowering_platforms=("cuda",))


def kernels(program: Any) -> list[str]:
    """The types of each kernel's arguments and results."""
    calls = [line for line in program.as_text().splitlines() if "custom_call @mosaic_gpu" in line]
    return [call[call.rindex(" : ") :] for call in calls]


def decoding(split: Split, rows: int, **how: Any) -> Any:
    """A program of one step of so many rows."""
    tables = ShapeDtypeStruct((rows, 4), jnp.int32)
    state = jax.eval_shape(lambda: State.create(rows))
    extras = jax.eval_shape(lambda: Extras.create(rows, CONFIG.vocab_size))
    fields = ShapeDtypeStruct((rows, FIELDS), jnp.int32)
    decode = functools.partial(steps.step.__wrapped__, plan=PLANS[1], steps=1)
    return lowered(split, decode, tables, state, extras, fields, **how)


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
@pytest.mark.parametrize("tp", [2, 4])
def test_kernels_on_each_device(tp: int) -> None:
    split = mesh(tp)
    row, tables = ShapeDtypeStruct((8,), jnp.int32), ShapeDtypeStruct((8, 4), jnp.int32)
    tokens = ShapeDtypeStruct((8, 64), jnp.int32)
    prefill = lowered(split, steps.score.__wrapped__, tables, tokens, row, row, tokens)
    (attention,) = kernels(prefill)
    heads = CONFIG.num_heads // tp
    assert f"tensor<8x64x{heads}x128xbf16>" in attention
    program = decoding(split, 8)
    calls = kernels(program)
    # Query heads by the key/value head that they share, and the pool of keys and values.
    kv = CONFIG.num_kv_heads // tp
    asked, pool = f"tensor<8x{kv}x7x128xbf16>", f"tensor<{2 * PAGES}x{kv}x128x128xbf16>"
    assert any(asked in call and pool in call for call in calls)
    assert any(f"tensor<8x{CONFIG.vocab_size}xf32>" in call for call in calls)
    if hopper.compiles():
        compiled = program.compile()
        assert collectives(compiled.as_text()) == {"all-reduce": 3, "all-gather": 1}
        pool = 2 * PAGES * kv * PAGE * 128 * DTYPE.itemsize
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= pool > memory.temp_size_in_bytes


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
def test_sums_of_few_rows_are_a_kernel() -> None:
    """With XLA's products between them: of the embedding, o_proj and down_proj."""
    program = decoding(dataclasses.replace(mesh(2), exchange=True), 8)
    assert program.as_text().count("uses_xla_collective_metadata = true") == 3
    if hopper.compiles():
        assert collectives(program.compile().as_text()) == {"all-gather": 1}


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
@pytest.mark.parametrize(
    ("tp", "rows", "stored"),
    [(2, 1, "bfloat16"), (2, 64, "bfloat16"), (4, 8, "bfloat16"), (2, 8, "q4_k")],
)
@pytest.mark.parametrize("exchange", [False, True])
def test_a_step_is_a_kernel_on_each_device(tp: int, rows: int, stored: str, exchange: bool) -> None:
    """The embedding's rows are added up before it, by XLA or by our kernel; nothing else is sent
    but by the kernels themselves, which reach the other devices by plain addresses."""
    split = dataclasses.replace(mesh(tp), exchange=exchange)
    program = decoding(split, rows, weights=functools.partial(packed, stored=stored))
    text = program.as_text()
    assert text.count("uses_xla_collective_metadata = true") == 1 + exchange
    assert not re.search(r"multimem_parameters|symmetric_memory_parameters|nvshmem", text)
    assert any(f"tensor<{rows}x{CONFIG.vocab_size}xf32>" in call for call in kernels(program))
    if hopper.compiles():
        compiled = program.compile()
        assert collectives(compiled.as_text()) == ({} if exchange else {"all-reduce": 1})
        pool = 2 * PAGES * CONFIG.num_kv_heads // tp * PAGE * 128 * DTYPE.itemsize
        memory, logits = compiled.memory_analysis(), rows * CONFIG.vocab_size * 4
        # No copy of the pool.
        assert memory.alias_size_in_bytes >= pool
        assert pool + 2 * logits > memory.temp_size_in_bytes


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
@pytest.mark.parametrize("rows", [1, 64])
def test_a_step_of_parts_that_are_not_whole_tiles(rows: int) -> None:
    weights = functools.partial(packed, config=UNEVEN)
    program = decoding(mesh(2), rows, weights=weights, config=UNEVEN)
    assert any(f"tensor<{rows}x{UNEVEN.vocab_size}xf32>" in call for call in kernels(program))
    if hopper.compiles():
        assert collectives(program.compile().as_text()) == {"all-reduce": 1}


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
@pytest.mark.parametrize(
    ("stored", "config"), [("bfloat16", CONFIG), ("q4_k", CONFIG), ("bfloat16", UNEVEN)]
)
def test_prefill_multiplies_with_each_devices_stream(stored: str, config: ModelConfig) -> None:
    split, tables = mesh(2), ShapeDtypeStruct((8, 4), jnp.int32)
    row, tokens = ShapeDtypeStruct((8,), jnp.int32), ShapeDtypeStruct((8, 64), jnp.int32)
    score = steps.score.__wrapped__
    weights = functools.partial(packed, stored=stored, config=config)
    program = lowered(
        split, score, tables, tokens, row, row, tokens, weights=weights, config=config
    )
    # Attention, a layer's four products and the head's.
    assert len(kernels(program)) == 6
    if hopper.compiles():
        program.compile()
