"""Decode speed end to end through `engine.decode_many`, sampling included, on random weights.

python -m benchmarks.gpu_decode --size=0.5b --batch=1 --context=128
"""

import argparse
import json
import time
from collections.abc import Iterator
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_model import SIZES
from qwen_jax.config import ModelConfig
from qwen_jax.engine import Engine, Prompt
from qwen_jax.packed import prepare
from qwen_jax.sampling import Sampling, plan_rows
from qwen_jax.weights.names import parameters


def random_parameters(
    config: ModelConfig, dtype: jnp.dtype, seed: int
) -> Iterator[tuple[str, jax.Array]]:
    """Parameters of real shapes, drawn on the device: nothing is zero, norms are near 1."""
    keys = jax.random.split(jax.random.key(seed), 13 * config.num_layers + 3)
    for key, parameter in zip(keys, parameters(config, "gguf"), strict=False):
        values = jax.random.normal(key, parameter.shape, dtype) * 0.02
        if parameter.keep_float32:
            values = 1 + values.astype(jnp.float32)
        yield parameter.name, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()

    config = SIZES[args.size]
    dtype = jnp.dtype(args.dtype)
    drawn = random_parameters(config, dtype, seed=time.time_ns() % 2**31)
    packed = prepare(config, drawn, dtype, args.implementation)
    engine = Engine(config, packed, implementation=args.implementation)
    plan, numbers = plan_rows([Sampling(args.temperature)] * args.batch, config.vocab_size)
    rng = np.random.default_rng()
    prompts = [
        Prompt(rng.integers(0, config.vocab_size, args.context).tolist(), args.steps + 1)
        for _ in range(args.batch)
    ]
    seconds = []
    for turn in range(args.rounds + 1):
        rows, _ = engine.prefill(prompts, plan, numbers)
        jax.block_until_ready(rows)
        start = time.perf_counter()
        jax.block_until_ready(engine.decode_many(rows, numbers, plan, args.steps))
        if turn:  # the first compiles
            seconds.append((time.perf_counter() - start) / args.steps)
    weights = config.num_parameters * dtype.itemsize
    if not config.tied:
        weights -= config.vocab_size * config.hidden_size * dtype.itemsize  # one row is read
    step = median(seconds)
    print(
        f"{args.size} {args.implementation} batch {args.batch} context {args.context}: "
        f"{step * 1e6:.0f} us a step, {args.batch / step:.0f} tokens/s, "
        f"{weights / step / 1e9:.0f} GB/s of weights"
    )
    record = vars(args) | {
        "benchmark": "gpu_decode",
        "us": [round(s * 1e6, 1) for s in seconds],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
