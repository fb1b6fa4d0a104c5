"""Decode speed of `steps.step`, sampling included, on random weights.

    python -m benchmarks.gpu_decode --sizes 0.5b 1.5b --batches 1 8 --contexts 128 2048

One table, in one run: the engine as it chooses ("auto", which names the decode-step kernel where
it serves), the XLA path, and the floor: the bytes a step must read over the bandwidth of a large
copy measured in the same run. Pages hold random keys and values, so that no prompt has to be
run; block tables are those of the whole context, as in a run. All programs are compiled first,
several at a time. Ends with one line of JSON.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_model import SIZES
from pallas_kernels.sample_tokens import pack
from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.rows import Rows, pack_rows
from qwen_jax.engine.sampling import Plan, Sampling, is_sampled, settings_of
from qwen_jax.engine.steps import Extras, State
from qwen_jax.engine.weights import PackedWeights, prepare
from qwen_jax.model.cache import HEADS, PAGE, bytes_per_token, pages_for
from qwen_jax.weights.names import parameters

DTYPE = jnp.dtype(jnp.bfloat16)
STEPS = 32
"""Steps a call: the engine's are fewer, and run into each other."""
GROWTH = 512
"""Tokens that a text may grow by."""


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
    engine: Engine
    run: Any


class Inputs(NamedTuple):
    """What `steps.step` takes between the weights and what is static."""

    pages: Any
    tables: Any
    state: State
    extras: Extras | None
    packed: Any


def pages_of(engine: Engine, positions: int) -> int:
    """Pages of a text of so many tokens, and room to grow."""
    return min(pages_for(positions + GROWTH), pages_for(engine.config.context_length))


def inputs_of(
    engine: Engine, batch: int, context: int, sampling: Sampling, top: int | None = None
) -> Inputs:
    """Rows that hold `context` random tokens each, in pages in random order."""
    config, rng = engine.config, np.random.default_rng()
    each, width = pages_of(engine, context), pages_for(config.context_length)
    table = np.zeros((batch, width), np.int32)
    table[:, :each] = 1 + rng.permutation(batch * each).reshape(batch, each)
    layers = 2 * config.num_layers
    spec, split = engine.spec, engine.spec.split
    shape = (layers, 1 + batch * each, spec.cached.num_kv_heads, PAGE, config.head_dim)
    key = jax.random.key(int(rng.integers(2**31)))
    draw = jax.jit(
        lambda key: jax.random.normal(key, shape, spec.cache), out_shardings=split.sharding(HEADS)
    )
    settings = [settings_of(dataclasses.replace(sampling, seed=row), top) for row in range(batch)]
    columns = jax.tree.map(lambda *parts: np.concatenate(parts), *settings)
    full = np.full(batch, context, np.int32)
    ones, token = np.ones_like(full), rng.integers(0, config.vocab_size, batch).astype(np.int32)
    slots = np.arange(batch, dtype=np.int32)
    packed = pack_rows(Rows._make([slots, ones, ones, token, 0 * ones, full, ones << 30, columns]))
    extras = None
    if is_sampled(sampling, top):
        extras = Extras.create(batch, config.vocab_size)
        seen = pack(
            [rng.integers(config.vocab_size, size=context) for _ in full], config.vocab_size
        )
        extras = extras._replace(counts=extras.counts._replace(seen=jnp.asarray(seen)))
    state = State(jnp.asarray(token), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))
    return Inputs(
        draw(key),
        jnp.asarray(table),
        split.placed(state),
        split.placed(extras),
        jnp.asarray(packed),
    )


def plan_of(engine: Engine, sampling: Sampling, top: int | None = None) -> Plan:
    return Plan.of([(sampling, top)], engine.config.vocab_size)


def program(engine: Engine, inputs: Inputs, plan: Plan) -> Any:
    """Compiled; static arguments are gone."""
    lowered = steps.step.lower(engine.spec, engine.weights, *inputs, plan, STEPS)
    return lowered.compile()


def go_on(engine: Engine, run: Any, inputs: Inputs) -> Inputs:
    """A call, and the inputs of the next one, which goes on where it ended."""
    pages, state, extras, emitted = run(engine.weights, *inputs)
    jax.block_until_ready(emitted)
    return Inputs(pages, inputs.tables, state, extras, inputs.packed)


def engines(config: ModelConfig) -> dict[str, Engine]:
    """The same random weights, as the engine packs them and plain."""
    seed = time.time_ns() % 2**31
    made = {}
    for implementation in ("auto", "xla"):
        drawn = random_parameters(config, DTYPE, seed)
        weights = prepare(config, drawn, DTYPE, implementation)
        made[implementation] = Engine(
            config, weights, implementation=implementation, slots=1, cache_tokens=PAGE
        )
    return made


def compiled(config: ModelConfig, wanted: list[tuple[int, int]], args: Any) -> list[Case]:
    """Every case's program, compiled on several threads."""
    sampling = Sampling(args.temperature)

    def compile_one(case: tuple[tuple[str, Engine], tuple[int, int]]) -> Case:
        (name, engine), (batch, context) = case
        inputs = shapes_of(engine, batch, context, sampling)
        return Case(
            name, batch, context, engine, program(engine, inputs, plan_of(engine, sampling))
        )

    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(compile_one, itertools.product(engines(config).items(), wanted)))


def shapes_of(
    engine: Engine, batch: int, context: int, sampling: Sampling, top: int | None = None
) -> Inputs:
    """Of `inputs_of`, without the pages themselves."""
    made: Inputs = jax.eval_shape(
        lambda: jax.tree.map(jnp.asarray, inputs_of(engine, batch, context, sampling, top))
    )

    def there(tree: Any, axis: int | None) -> Any:
        sharding = engine.spec.split.sharding(axis)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    return made._replace(
        pages=there(made.pages, HEADS),
        state=there(made.state, None),
        extras=there(made.extras, None),
    )


def seconds_a_step(case: Case, args: Any) -> list[float]:
    inputs = inputs_of(case.engine, case.batch, case.context, Sampling(args.temperature))
    seconds = []
    for turn in range(args.rounds + 1):
        jax.block_until_ready(inputs)
        start = time.perf_counter()
        inputs = go_on(case.engine, case.run, inputs)
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
            if 2 * batch * (context + GROWTH + PAGE) * token < most
        ]
        cases = compiled(config, wanted, args)
        for batch, context in wanted:
            both = [c for c in cases if (c.batch, c.context) == (batch, context)]
            times = {c.implementation: seconds_a_step(c, args) for c in both}
            auto, xla = (median(times[name]) for name in ("auto", "xla"))
            read = weight_bytes(config) + batch * context * token
            weights = both[0].engine.weights
            fused = isinstance(weights, PackedWeights) and weights.serves(batch)
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
