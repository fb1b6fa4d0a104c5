"""A model on two GPUs is the model on one, and its attention runs on each one's kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
import qwen_jax
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.split_packed import SplitPacked, pack_split
from qwen_jax.engine.split_weights import SplitWeights, splits_of
from qwen_jax.engine.weights import PackedWeights
from qwen_jax.mesh import MeshShape
from qwen_jax.model.split import AXIS, Split
from tests.engines import Prompt, generate, relative
from tests.numpy_reference import log_softmax
from tests.tiny_checkpoints import canonical, random_parameters

WORDS = ("river", "ship", "stone", "spring", "bridge", "forest", "rain", "clock")
"""Of each, float32 prefers every token by half a nat at least."""

pytestmark = pytest.mark.skipif(len(jax.devices()) < 2, reason="it needs two GPUs")


@functools.cache
def model(mesh: str | None, dtype: str, implementation: str = "auto") -> qwen_jax.Model:
    return qwen_jax.load(mesh=mesh, dtype=dtype, implementation=implementation, slots=8)


def haikus(made: qwen_jax.Model) -> list[str]:
    prompts = [f"haiku: {word}" for word in WORDS]
    return [completion.text for completion in made.generate(prompts, max_tokens=40)]


@pytest.mark.parametrize("mesh", ["tp=2", "dp=2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_haikus(mesh: str, dtype: str) -> None:
    assert haikus(model(mesh, dtype)) == haikus(model(None, "float32", "xla"))


def test_logits() -> None:
    """As tests/mesh has them on CPUs: float32 rounds its sums anew, bfloat16 once more each."""
    exact = model(None, "float32", "xla")
    tokens = exact.tokens("haiku: snow")
    theirs = exact.logits(tokens)
    assert relative(model("tp=2", "float32").logits(tokens), theirs) < 1e-6
    one, two = (
        relative(model(m, "bfloat16", "xla").logits(tokens), theirs) for m in (None, "tp=2")
    )
    assert two < 2**0.5 * one


def test_replicas_run_the_step_kernel() -> None:
    """Each on its own device, with weights as the kernel reads them."""
    both = model("dp=2", "bfloat16", "mosaic_gpu")
    engines = (both.engine, *both.engine.others)
    assert [type(engine.weights) for engine in engines] == [PackedWeights] * 2
    assert set().union(*(engine.weights.devices() for engine in engines)) == {*jax.devices()[:2]}
    assert haikus(both) == haikus(model(None, "float32", "xla"))


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sums_by_our_kernel(rows: int, dtype: str) -> None:
    """Each of many without a pause is NCCL's, which rounds a sum of two once as well."""
    (split,) = splits_of(MeshShape(tp=2))
    assert isinstance(split, Split)
    ours = functools.partial(
        pallas_kernels.all_reduce, axis=AXIS, devices=split.numbers, implementation="mosaic_gpu"
    )

    def many(key: jax.Array) -> jax.Array:
        def drawn(turn: jax.Array) -> jax.Array:
            own = jax.random.fold_in(key, 2 * turn + jax.lax.axis_index(AXIS))
            return jax.random.normal(own, (rows, 3584), dtype)

        sums = jax.lax.map(lambda turn: ours(drawn(turn)), jnp.arange(64))
        theirs = jax.lax.map(lambda turn: jax.lax.psum(drawn(turn), AXIS), jnp.arange(64))
        return jax.lax.psum(jnp.sum(sums != theirs), AXIS)

    counted = jax.jit(split.over(many, (None,), None))
    for seed in range(8):
        assert counted(split.placed(jax.random.key(seed))) == 0


def test_the_step_kernel_on_each_device() -> None:
    """The same texts, and the same logits every time."""
    two = model("tp=2", "bfloat16")
    assert isinstance(two.engine.weights, SplitPacked)
    assert two.engine.weights.serves(8)
    expected = haikus(model(None, "float32", "xla"))
    for _ in range(3):
        assert haikus(two) == expected
    exact = model(None, "float32", "xla")
    tokens = exact.tokens("haiku: snow")
    theirs = exact.logits(tokens)
    one, both = (relative(m.logits(tokens), theirs) for m in (model(None, "bfloat16"), two))
    assert both < 2**0.5 * one


def test_parts_that_are_not_whole_tiles() -> None:
    """5.75 of the feed-forward: of a text written by steps of the kernels every token's
    log-probability is as near to float32's as one device's XLA in bfloat16 comes."""
    config = ModelConfig(2, 512, 8, 4, 64, 1472, 1024, 4096, 1e6, 1e-6, tied=False)
    (split,) = splits_of(MeshShape(tp=2))
    assert isinstance(split, Split)
    wide = {n: jnp.asarray(x) for n, x in canonical(random_parameters(config, 7)).items()}
    halves = {n: x if n.endswith("norm") else x.astype(jnp.bfloat16) for n, x in wide.items()}
    of_all: dict[str, Any] = {"slots": 8, "cache_tokens": 4096}
    dealt = SplitWeights.deal(config, split, halves.items())
    kernel, bfloat16 = "mosaic_gpu", jnp.dtype(jnp.bfloat16)
    packed = pack_split(config, dealt.named.items(), bfloat16, kernel, split)
    assert packed.serves(8)
    two = Engine(config, packed, implementation=kernel, split=split, **of_all)
    prompts = [Prompt([3 * n + 1, 5, n], 40) for n in range(8)]
    written = generate(two, prompts, logprobs=True)
    widened = {n: x.astype(jnp.float32) for n, x in halves.items()}
    exact = Engine(config, widened, implementation="xla", **of_all)
    one = Engine(config, halves, implementation="xla", **of_all)
    ours, theirs = [], []
    for prompt, tokens, found in zip(prompts, written.tokens, written.logprobs, strict=True):
        text, begin = [*prompt.tokens, *tokens], len(prompt.tokens) - 1
        right, xla = (
            log_softmax(engine.logits(text)[begin:-1])[np.arange(len(tokens)), tokens]
            for engine in (exact, one)
        )
        ours.append(np.asarray(found) - right)
        theirs.append(xla - right)
    mine, xlas = (float(np.sqrt(np.mean(np.concatenate(x) ** 2))) for x in (ours, theirs))
    print(f"kernels {mine:.2e}, xla {xlas:.2e}")
    assert mine <= 2 * xlas


def test_blocks_are_for_the_step_kernel() -> None:
    with pytest.raises(qwen_jax.UserError, match="without: implementation is xla; choose auto"):
        qwen_jax.load(mesh="tp=2", dtype="bfloat16", weights="packed", implementation="xla")
    two = qwen_jax.load(mesh="tp=2", weights="packed", dtype="bfloat16", slots=8)
    assert two.engine.weights.in_blocks
    one = qwen_jax.load(weights="packed", dtype="bfloat16", slots=8)
    exact = model(None, "float32", "xla")
    tokens = exact.tokens("haiku: snow")
    theirs = exact.logits(tokens)
    assert relative(two.logits(tokens), theirs) < 2**0.5 * relative(one.logits(tokens), theirs)
