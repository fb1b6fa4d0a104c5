"""A whole decode step of one row on a GPU, against the model in float32 on the same weights."""

import functools
import secrets
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import ModelConfig
from qwen_jax.engine import Engine, Prompt
from qwen_jax.packed import PackedWeights, pack
from qwen_jax.sampling import Sampling, plan_rows
from tests.engines import generate, relative
from tests.tiny_checkpoints import canonical, random_parameters

SEED = secrets.randbits(31)

# Layers of real shapes with a small vocabulary: every phase has its real size.
CONFIGS = {
    "small": ModelConfig(2, 256, 4, 2, 64, 512, 1024, 16384, 1e6, 1e-6, tied=False),
    "small, H 128": ModelConfig(3, 512, 4, 2, 128, 1024, 1024, 16384, 1e6, 1e-6, tied=True),
    "0.5b": ModelConfig(3, 896, 14, 2, 64, 4864, 2048, 16384, 1e6, 1e-6, tied=True),
    "1.5b": ModelConfig(2, 1536, 12, 2, 128, 8960, 2048, 16384, 1e6, 1e-6, tied=True),
    "7b": ModelConfig(2, 3584, 28, 4, 128, 18944, 2048, 16384, 1e6, 1e-6, tied=False),
}
SMALL = CONFIGS["small"]


def parameters(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """Random bfloat16 weights with key biases to about 150 (large ones are real in Qwen2.5)."""
    params = {
        name: jnp.asarray(value, "float32" if name.endswith("norm") else "bfloat16")
        for name, value in canonical(random_parameters(config, seed)).items()
    }
    q = config.num_heads * config.head_dim
    for i in range(config.num_layers):
        name = f"layers.{i}.qkv_proj.bias"
        params[name] = params[name].at[q : q + 4].set(jnp.asarray([150, -150, 75, -75]))
    return params


def after_prompt(engine: Engine, tokens: list[int], poison: bool) -> np.ndarray:
    """Log-probabilities of what follows `tokens`, its last one fed through a decode step."""
    vocab = engine.config.vocab_size
    plan, numbers = plan_rows([Sampling()], vocab, top_logprobs=vocab)
    rows, _ = engine.prefill([Prompt(tokens[:-1], 8)], plan, numbers)
    keep = jnp.arange(rows.cache.capacity)[:, None] < len(tokens) - 1

    def poisoned(x: jax.Array) -> jax.Array:
        return jnp.where(keep, x, jnp.nan) if poison else x

    cache = jax.tree.map(poisoned, rows.cache)
    token = jnp.asarray(tokens[-1:], jnp.int32)
    rows = type(rows)(
        cache, rows.length, token, rows.generated, rows.limit, jnp.zeros(1, bool), rows.counts
    )
    _, emitted = engine.decode_step(rows, numbers, plan)
    out = np.empty(vocab, np.float32)
    out[np.asarray(emitted.choice.top_ids[0])] = np.asarray(emitted.choice.top_logprobs[0])
    return out


class Engines(NamedTuple):
    """The same bfloat16 weights three ways."""

    truth: Engine  # in float32
    xla: Engine
    kernel: Engine


@functools.cache
def engines(name: str) -> Engines:
    config = CONFIGS[name]
    params = parameters(config, SEED)
    packed = pack(config, params.items(), jnp.dtype(jnp.bfloat16), "mosaic_gpu")
    truth = {name: value.astype(jnp.float32) for name, value in params.items()}
    return Engines(
        Engine(config, truth, implementation="xla"),
        Engine(config, params, implementation="xla"),
        Engine(config, packed),
    )


# The last has several tiles of slots for each block.
@pytest.mark.parametrize("length", [2, 64, 65, 129, 700, 2047, 9001])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_worse_than_twice_the_xla_path(name: str, length: int) -> None:
    three = engines(name)
    vocab = CONFIGS[name].vocab_size
    tokens = np.random.default_rng(SEED + length).integers(0, vocab, length).tolist()
    truth = after_prompt(three.truth, tokens, False)
    xla = after_prompt(three.xla, tokens, False)
    kernel, again = (after_prompt(three.kernel, tokens, True) for _ in range(2))
    ours, theirs = relative(kernel, truth), relative(xla, truth)
    print(f"seed {SEED}, {name}, length {length}: kernel {ours:.2e}, xla {theirs:.2e}")
    assert ours <= 2 * theirs
    assert np.array_equal(kernel, again)


def test_a_thousand_steps_stay_with_the_reference() -> None:
    params = parameters(SMALL, 3)
    packed = pack(SMALL, params.items(), jnp.dtype(jnp.bfloat16), "mosaic_gpu")
    truth_params = {name: value.astype(jnp.float32) for name, value in params.items()}
    truth = Engine(SMALL, truth_params, implementation="xla")
    prompt = Prompt([1, 2, 3], 1001)

    def behind(engine: Engine) -> np.ndarray:
        """How much likelier the float32 model, fed the same text, finds its own best choice."""
        tokens = generate(engine, [prompt], chunk=50).tokens[0]
        assert len(tokens) == 1001
        logits = truth.logits([*prompt.tokens, *tokens[:-1]])[2:]
        return logits.max(axis=1) - np.take_along_axis(logits, np.array(tokens)[:, None], 1)[:, 0]

    kernel, xla = behind(Engine(SMALL, packed)), behind(Engine(SMALL, params))
    print(f"mean behind the best: kernel {kernel.mean():.2e}, xla {xla.mean():.2e}")
    assert kernel.mean() <= 2 * xla.mean()
    assert kernel[-250:].mean() <= 2 * xla.mean()


def test_larger_models_and_batches_take_another_way() -> None:
    assert isinstance(
        pack(SMALL, parameters(SMALL, 0).items(), jnp.dtype(jnp.bfloat16), "auto"), PackedWeights
    )
    prompts = [Prompt([1, 2, 3], 20), Prompt([4, 5], 20)]
    params = parameters(SMALL, 0)
    packed = pack(SMALL, params.items(), jnp.dtype(jnp.bfloat16), "auto")
    both = generate(Engine(SMALL, packed), prompts)
    plain = generate(Engine(SMALL, params), prompts)
    assert both.tokens == plain.tokens
