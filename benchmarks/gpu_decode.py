"""Decode speed end to end through `engine.decode_many`, sampling included, on random weights.

    python -m benchmarks.gpu_decode --sizes 0.5b 1.5b --batches 1 8 --contexts 128 2048

One table, in one run: the engine as it chooses ("auto", which names the decode-step kernel where
it serves), the XLA path, and the floor: the bytes a step must read over the bandwidth of a large
copy measured in the same run. Caches hold random keys and values, so that no prompt has to be
run. All programs are compiled first, several at a time. Ends with one line of JSON.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.random_model import SIZES
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine, bucket
from qwen_jax.engine.sampling import Sampling, plan_rows
from qwen_jax.engine.steps import Rows
from qwen_jax.engine.weights import prepare
from qwen_jax.model.cache import SMALLEST_CAPACITY, bytes_per_token
from qwen_jax.weights.names import parameters

DTYPE = jnp.dtype(jnp.bfloat16)
STEPS = 32
"""Steps a call, as the engine generates on a GPU."""


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


def copy_bandwidth() -> float:
    """Bytes a second, reads and writes counted, of a copy of 2 GiB."""
    source = jax.random.normal(jax.random.key(time.time_ns() % 2**31), (2**29,), jnp.float32)
    copy = jax.jit(lambda x: x * 2)
    jax.block_until_ready(copy(source))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready([copy(source) for _ in range(4)])
        seconds.append((time.perf_counter() - start) / 4)
    return 2 * source.nbytes / median(seconds)


def print_record(
    benchmark: str, args: argparse.Namespace, bandwidth: float, us: dict[str, Any]
) -> None:
    """The line of JSON a run ends with."""
    record = vars(args) | {
        "benchmark": benchmark,
        "copy_gb_s": round(bandwidth / 1e9),
        "us": us,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(record))


class Case(NamedTuple):
    """One engine at one batch and context, compiled."""

    implementation: str
    batch: int
    context: int
    capacity: int
    engine: Engine
    run: Any


def slots(context: int, rounds: int) -> int:
    """The capacity of a cache that a text grows in by the steps of every round."""
    return bucket(context + STEPS * (rounds + 1), SMALLEST_CAPACITY)


def rows_of(engine: Engine, batch: int, context: int, capacity: int) -> Rows:
    """Rows that hold `context` random tokens each, as they are after the first steps."""
    config = engine.config
    key = jax.random.key(time.time_ns() % 2**31)
    draw = jax.jit(lambda key, of: jax.random.normal(key, of.shape, of.dtype), static_argnums=1)
    keys = iter(jax.random.split(key, 2 * config.num_layers))
    empty = jax.eval_shape(lambda: engine.create_cache(batch, capacity))
    cache = jax.tree.map(lambda x: draw(next(keys), x), empty)
    full = jnp.full((batch,), context, jnp.int32)
    token = jax.random.randint(key, (batch,), 0, config.vocab_size)
    return Rows(
        cache=cache,
        prompt=full,
        token=token,
        generated=jnp.ones_like(full),
        limit=jnp.full_like(full, 1 << 30),
        done=jnp.zeros((batch,), bool),
        counts=None,
    )


def sampling_of(config: ModelConfig, batch: int, temperature: float) -> tuple[Any, Any]:
    return plan_rows([Sampling(temperature)] * batch, config.vocab_size)


def engines(config: ModelConfig) -> dict[str, Engine]:
    """The same random weights, as the engine packs them and plain."""
    seed = time.time_ns() % 2**31
    made = {}
    for implementation in ("auto", "xla"):
        drawn = random_parameters(config, DTYPE, seed)
        weights = prepare(config, drawn, DTYPE, implementation)
        made[implementation] = Engine(config, weights, implementation=implementation)
    return made


def compiled(config: ModelConfig, wanted: list[tuple[int, int]], args: Any) -> list[Case]:
    """Every case's program, compiled on several threads."""

    def compile_one(case: tuple[tuple[str, Engine], tuple[int, int]]) -> Case:
        (name, engine), (batch, context) = case
        capacity = slots(context, args.rounds)
        rows = jax.eval_shape(lambda: rows_of(engine, batch, context, capacity))
        plan, numbers = sampling_of(config, batch, args.temperature)
        decode: Any = engine._decode
        program = decode.lower(engine.weights, rows, numbers, plan, STEPS).compile()
        return Case(name, batch, context, capacity, engine, program)

    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(compile_one, itertools.product(engines(config).items(), wanted)))


def seconds_a_step(config: ModelConfig, case: Case, args: Any) -> list[float]:
    rows = rows_of(case.engine, case.batch, case.context, case.capacity)
    _, numbers = sampling_of(config, case.batch, args.temperature)
    seconds = []
    for turn in range(args.rounds + 1):
        jax.block_until_ready(rows)
        start = time.perf_counter()
        rows, emitted = case.run(case.engine.weights, rows, numbers)
        jax.block_until_ready(emitted)
        if turn:  # the first warms up
            seconds.append((time.perf_counter() - start) / STEPS)
    return seconds


def weight_bytes(config: ModelConfig) -> int:
    size = config.num_parameters * DTYPE.itemsize
    # Of an embedding that is not the head, one row is read.
    return size if config.tied else size - config.vocab_size * config.hidden_size * DTYPE.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["0.5b"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()

    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s; microseconds a step, medians of {args.rounds}")
    print(f"{'size':<6}{'batch':>6}{'context':>9}{'floor':>8}{'auto':>8}{'xla':>8}{'ratio':>7}"
          f"{'GB/s':>7}{'tokens/s':>10}  kernel")  # fmt: skip
    figures = {}
    for size in args.sizes:
        config = SIZES[size]
        # Beside two copies of the weights, a cache must fit, and room to draw it.
        most = 125e9 - 2 * config.num_parameters * DTYPE.itemsize
        token = bytes_per_token(config, DTYPE.itemsize)
        wanted = [
            (batch, context)
            for batch, context in itertools.product(args.batches, args.contexts)
            if 2 * batch * slots(context, args.rounds) * token < most
        ]
        cases = compiled(config, wanted, args)
        for batch, context in wanted:
            both = [c for c in cases if (c.batch, c.context) == (batch, context)]
            times = {c.implementation: seconds_a_step(config, c, args) for c in both}
            auto, xla = (median(times[name]) for name in ("auto", "xla"))
            read = weight_bytes(config) + batch * context * token
            fused = both[0].engine.fuses(batch)
            print(
                f"{size:<6}{batch:>6}{context:>9}{read / bandwidth * 1e6:>8.0f}{auto * 1e6:>8.0f}"
                f"{xla * 1e6:>8.0f}{auto / xla:>7.2f}{read / auto / 1e9:>7.0f}"
                f"{batch / auto:>10,.0f}  {'decode_step' if fused else 'attention'}",
                flush=True,
            )
            figures[f"{size} {batch} {context}"] = {
                name: [round(s * 1e6, 1) for s in taken] for name, taken in times.items()
            }
    print_record("gpu_decode", args, bandwidth, figures)


if __name__ == "__main__":
    main()
