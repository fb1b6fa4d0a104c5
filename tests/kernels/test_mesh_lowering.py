"""A mesh's programs for Hopper, lowered, and compiled where they can be: attention and sampling are
kernels on each device, and devices exchange what they must and no more."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import AbstractMesh, Mesh

from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.sampling import PLANS
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.split_weights import SplitWeights
from qwen_jax.engine.steps import Extras, State
from qwen_jax.model.cache import HEADS, PAGE, create_pages
from qwen_jax.model.decoder import dealt_axis
from qwen_jax.model.split import AXIS, Split
from qwen_jax.weights import names
from tests.kernels import hopper
from tests.mesh.eight import collectives

DTYPE = jnp.dtype(jnp.bfloat16)
CONFIG = ModelConfig(1, 3584, 28, 4, 128, 18944, 152064, 4 * PAGE, 1e6, 1e-6, False)
"""A layer of 7B."""

PAGES = 513
"""Of a pool larger than all else that a step needs."""


def mesh(tp: int) -> Split:
    """Of GPUs that needn't be there, or of none in particular where nothing can be compiled."""
    if (found := hopper.devices(tp)) is None:
        return Split(AbstractMesh((tp,), (AXIS,)))  # type: ignore[arg-type]
    return Split(Mesh(np.array(found), (AXIS,)))


def lowered(split: Split, function: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
    """For CUDA."""
    spec = Spec(CONFIG, DTYPE, DTYPE, valid_tokens=CONFIG.vocab_size, split=split)

    def placed(x: Any, axis: int | None = None) -> ShapeDtypeStruct:
        return ShapeDtypeStruct(x.shape, x.dtype, sharding=split.sharding(axis))

    named = {
        p.name: placed(
            ShapeDtypeStruct(p.shape, jnp.float32 if p.keep_float32 else DTYPE), dealt_axis(p.name)
        )
        for p in names.parameters(CONFIG, "gguf")
    }
    weights: Any = SplitWeights(named, CONFIG, split)
    made = jax.eval_shape(lambda: create_pages(spec.cached, PAGES, DTYPE))
    given = (weights, placed(made, HEADS), *jax.tree.map(placed, arguments))
    program = jax.jit(functools.partial(function, spec, **how), donate_argnums=1)
    return program.trace(*given).lower(lowering_platforms=("cuda",))


def kernels(program: Any) -> list[str]:
    """The types of each kernel's arguments and results."""
    calls = [line for line in program.as_text().splitlines() if "custom_call @mosaic_gpu" in line]
    return [call[call.rindex(" : ") :] for call in calls]


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
    state = jax.eval_shape(lambda: State.create(8))
    extras = jax.eval_shape(lambda: Extras.create(8, CONFIG.vocab_size))
    packed = ShapeDtypeStruct((8, steps.FIELDS), jnp.int32)
    decode = functools.partial(steps.step.__wrapped__, plan=PLANS[1], steps=1)
    program = lowered(split, decode, tables, state, extras, packed)
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
