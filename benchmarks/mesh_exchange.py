"""What devices store into each other's memory by kernels of our own: is it right, and how long does
it take. The part `--exchange` of `benchmarks.gpu_mesh`."""

import argparse
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

import pallas_kernels
from benchmarks.gpu_decode import (
    DTYPE,
    Case,
    plan_of,
    program,
    random_parameters,
    seconds_a_step,
    shapes_of,
)
from benchmarks.mesh_engines import (
    SEED,
    dealt,
    drawn_in_parts,
    on_several,
    packed_in_parts,
    packed_of,
    split_of,
)
from pallas_kernels.all_reduce import mosaic_gpu
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.split_packed import SplitPacked, refusal
from qwen_jax.engine.split_weights import SplitWeights
from qwen_jax.engine.weights import Weights, prepare
from qwen_jax.model.cache import HEADS, PAGE, Cache, create_pages
from qwen_jax.model.split import AXIS, WHOLE, Split, Whole

TIMES = 256
"""Sums in one program, each of which waits for the one before."""
REPEATS = 100
"""Steps of which all must give the same bits."""
CHECKED_LAYERS = 2


def exchange(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Sums over two GPUs by a kernel of our own beside NCCL's: first whether they are right, then
    microseconds; then the same of the decode step that is a kernel on each, of few layers whether
    it is right, and of the whole model beside the others."""
    split = split_of(args.tp)
    figures: dict[str, Any] = {}
    if why := mosaic_gpu.refusal(1, config.hidden_size, DTYPE, split.numbers):
        print(f"kernels can't exchange here: {why}")
        return {"refused": why}
    for rows in args.batches:
        figures[f"wrong {rows}"] = checked_sums(config, split, rows)
    for rows in args.batches:
        figures[f"us {rows}"] = timed_sums(config, split, rows, args.rounds)
    few = dataclasses.replace(config, num_layers=CHECKED_LAYERS)
    if why := refusal(few, DTYPE, split.numbers):
        print(f"the decode step's kernel can't run on these: {why}")
        return figures | {"step refused": why}
    figures["step off"] = checked_steps(few, split, args.batches)
    return figures | {"step us": timed_steps(config, split, args)}


def summed(split: Split, kind: str) -> Callable[[jax.Array], jax.Array]:
    """Inside of `split.over`."""
    if kind == "nccl":
        return functools.partial(lax.psum, axis_name=AXIS)
    return functools.partial(
        pallas_kernels.all_reduce, axis=AXIS, devices=split.numbers, implementation="mosaic_gpu"
    )


def checked_sums(config: ModelConfig, split: Split, rows: int) -> dict[str, int]:
    """How many numbers of random sums are not NCCL's, of `TIMES` sums between NCCL's and of as many
    one right after the other, whose results are known."""
    ours, theirs = summed(split, "ours"), summed(split, "nccl")
    shape, found = (rows, config.hidden_size), {}

    def beside(dtype: DTypeLike, key: jax.Array) -> jax.Array:
        def one(turn: Any, wrong: jax.Array) -> jax.Array:
            mine = jax.random.fold_in(key, turn * split.size + lax.axis_index(AXIS))
            x = jax.random.normal(mine, shape, dtype)
            return wrong + jnp.sum(ours(x) != theirs(x))

        return lax.psum(lax.fori_loop(0, TIMES, one, jnp.int32(0)), AXIS)

    def alone(_: jax.Array) -> jax.Array:
        """Whole numbers, of which float32 adds up these exactly."""
        places = jnp.arange(rows * config.hidden_size, dtype=jnp.float32).reshape(shape)

        def one(turn: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            before, wrong = state
            x = places + turn + lax.axis_index(AXIS) + 0 * before
            right = split.size * (places + turn) + split.size * (split.size - 1) // 2
            now = ours(x)
            return now, wrong + jnp.sum(now != right)

        _, wrong = lax.fori_loop(0, TIMES, one, (places, jnp.int32(0)))
        return lax.psum(wrong, AXIS)

    key = split.placed(jax.random.key(SEED))
    checks: dict[str, Callable[..., jax.Array]] = {
        "bfloat16 beside": functools.partial(beside, DTYPE),
        "float32 alone": alone,
    }
    for name, function in checks.items():
        counted = jax.jit(split.over(function, (None,), None))
        found[name] = int(sum(counted(key) for _ in range(4)))
        total = 4 * TIMES * split.size * rows * config.hidden_size
        print(f"{rows} rows, {name}: {found[name]:,} of {total:,} numbers wrong", flush=True)
    return found


def timed_sums(config: ModelConfig, split: Split, rows: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds of one, by us and by NCCL, of hidden states."""
    found: dict[str, list[float]] = {}
    for kind in ("ours", "nccl"):
        add = summed(split, kind)

        def many(x: jax.Array, add: Any = add) -> jax.Array:
            return lax.fori_loop(0, TIMES, lambda _, x: add(x) * 0.5, x)

        x = split.placed(jnp.ones((rows, config.hidden_size), DTYPE))
        run = jax.jit(split.over(many, (None,), None)).lower(x).compile()
        found[kind] = []
        for turn in range(rounds + 1):
            start = time.perf_counter()
            jax.block_until_ready(run(x))
            if turn:  # the first warms up
                found[kind].append(round((time.perf_counter() - start) / TIMES * 1e6, 2))
    each = ", ".join(f"{kind} {median(us):.1f} µs" for kind, us in found.items())
    print(f"{rows} rows, {x.nbytes:,} bytes: {each}", flush=True)
    return found


def checked_steps(config: ModelConfig, split: Split, batches: list[int]) -> dict[str, Any]:
    """Logits of one step on all devices beside those of the kernel on one, with the same weights
    and cache; and whether a step gives the same bits every time."""
    one = prepare(config, random_parameters(config, DTYPE, SEED), DTYPE, "mosaic_gpu")
    several = packed_of(config, dealt(config, split))
    both: list[tuple[Weights, Whole]] = [(one, WHOLE), (several, split)]
    cases = [(rows, weights, there) for rows in batches for weights, there in both]
    with ThreadPoolExecutor(16) as pool:
        steps = pool.map(lambda case: compiled_step(config, *case), cases)
    found = {}
    for rows in batches:
        exact, logits = next(steps)(), (run := next(steps))()
        same = sum(np.array_equal(logits, run()) for _ in range(REPEATS))
        error = float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))
        likeliest = float(np.mean(logits.argmax(axis=1) == exact.argmax(axis=1)))
        print(
            f"a step of {rows} rows, {config.num_layers} layers: logits {error:.2e} off, "
            f"{likeliest:.0%} of the likeliest the same, {same} of {REPEATS} steps the same bits",
            flush=True,
        )
        found[str(rows)] = {"logits": error, "likeliest": likeliest, "same": same}
    return found


def compiled_step(
    config: ModelConfig, rows: int, weights: Weights, there: Whole
) -> Callable[[], np.ndarray]:
    """A step of so many rows: what makes its logits."""
    spec = Spec(config, DTYPE, DTYPE, split=there)
    rng = np.random.default_rng(SEED)
    made = jax.eval_shape(lambda: create_pages(config, 1 + rows, DTYPE))
    pages = jax.jit(
        lambda key: jax.random.normal(key, made.shape, DTYPE), out_shardings=there.sharding(HEADS)
    )(jax.random.key(SEED))
    given = there.placed(
        (
            jnp.asarray(1 + rng.permutation(rows).reshape(rows, 1), jnp.int32),
            jnp.asarray(rng.integers(0, config.vocab_size, rows), jnp.int32),
            jnp.asarray(rng.integers(0, PAGE - 1, rows), jnp.int32),
            jnp.ones(rows, bool),
        )
    )

    @jax.jit
    def run(weights: Any, pages: Any, tables: Any, token: Any, position: Any, live: Any) -> Any:
        step = weights.forward(spec, rows)
        return step(token, Cache(pages, tables), position, live)[0]

    compiled = run.lower(weights, pages, *given).compile()
    return lambda: np.asarray(compiled(weights, pages, *given))


def step_engines(config: ModelConfig, split: Split) -> Iterator[dict[str, Engine]]:
    """First those of the kernel, then the others: weights of both may not fit."""
    of_all = {"slots": 1, "cache_tokens": PAGE}
    all_ours = dataclasses.replace(split, exchange=True)

    def engine(weights: SplitWeights | SplitPacked, implementation: str, on: Split) -> Engine:
        return on_several(config, dataclasses.replace(weights, split=on), implementation, **of_all)

    streams = packed_in_parts(config, split)
    yield {
        "kernel": engine(streams, "mosaic_gpu", split),
        # Nor for the embedding's rows.
        "kernel, no NCCL": engine(streams, "mosaic_gpu", all_ours),
    }
    del streams
    gc.collect()
    weights = drawn_in_parts(config, split)
    yield {
        "all-reduces ours": engine(weights, "auto", all_ours),
        "all-reduces NCCL's": engine(weights, "auto", split),
    }


def timed_steps(
    config: ModelConfig, split: Split, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Microseconds a step of every engine; of all but the first with one number of rows."""
    found: dict[str, list[float]] = {}
    for engines in step_engines(config, split):
        found |= timed_engines(engines, args, args.batches if not found else args.batches[:1])
        del engines
    return found


def timed_engines(
    engines: dict[str, Engine], args: argparse.Namespace, batches: list[int]
) -> dict[str, list[float]]:
    """The same of engines that are there at the same time, of which the first is timed with so many
    rows each."""
    settings = argparse.Namespace(temperature=0.0, rounds=args.rounds)
    greedy, context, found = Sampling(), args.contexts[0], {}

    def compiled(case: tuple[str, int]) -> Case:
        (name, rows), engine = case, engines[case[0]]
        inputs = shapes_of(engine, rows, context, greedy)
        return Case(name, rows, context, engine, program(engine, inputs, plan_of(engine, greedy)))

    first, *others = engines
    cases = [*((first, rows) for rows in batches), *((name, batches[0]) for name in others)]
    with ThreadPoolExecutor(16) as pool:
        ready = list(pool.map(compiled, cases))
    for case in ready:
        seconds = seconds_a_step(case, settings)
        name = f"{case.implementation}, {case.batch} rows"
        print(f"a step by {name}: {median(seconds) * 1e6:,.0f} µs", flush=True)
        found[name] = [round(s * 1e6, 1) for s in seconds]
    return found
