"""The decode-step kernel alone, on random weights of real shapes: time, and where it goes.

    python -m benchmarks.gpu_decode_step --sizes 0.5b 7b --rows 1 8 --contexts 128 --phases

Steps are chained on the device, each taking the last one's logits. With `--phases` a traced
kernel runs besides: when the blocks ended each phase of the last layer, in microseconds after the
first of them began it. Half a minute. Ends with one line of JSON.
"""

import argparse
import itertools
import time
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu_decode import copy_bandwidth, print_record
from benchmarks.random_model import SIZES
from pallas_kernels.decode_step import Plan, kernels
from pallas_kernels.decode_step.formats import FORMATS
from pallas_kernels.decode_step.step import PHASES
from qwen_jax.engine.weights import plan_for

STEPS = 64


def arguments(
    plan: Plan, rows: int, context: int, capacity: int, dtype: str = "bfloat16"
) -> tuple[Any, ...]:
    """What the kernel takes, drawn afresh; the tape repeats 64 MiB."""
    shape = plan.shape
    keys = iter(jax.random.split(jax.random.key(time.time_ns() % 2**31), 8))

    def normal(*dims: int, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.normal(next(keys), dims, dtype)

    repeats = -(-plan.tape_tiles // 2**14)
    tile = jax.jit(lambda x: jnp.tile(x * 0.02, (repeats, 1, 1))[: plan.tape_tiles])
    cache = (2 * shape.layers, rows, shape.kv_heads, capacity, shape.head_dim)
    return (
        tile(normal(2**14, 8, 256, dtype=dtype)),
        jnp.asarray(plan.table()),
        normal(shape.layers, shape.qkv),
        1 + 0.1 * normal(2 * shape.layers + 1, shape.hidden),
        normal(rows, shape.hidden),
        normal(rows, 2, shape.head_dim // 2),
        normal(*cache, dtype=dtype),
        jnp.full((rows,), context, jnp.int32),
    )


def microseconds(plan: Plan, args: tuple[Any, ...], capacity: int, rounds: int) -> list[float]:
    """A step's time, in every round of a chain."""
    step = kernels.build(plan, args[4].shape[0], capacity, args[0].dtype)

    @jax.jit
    def chain(*args: Any) -> Any:
        def body(_: Any, hidden: Any) -> Any:
            logits = step(*args[:4], hidden, *args[5:])[0]
            return hidden + logits[:, : hidden.shape[1]] * 1e-3

        return lax.fori_loop(0, STEPS, body, args[4])

    taken = []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(chain(*args))
        if turn:  # the first compiles
            taken.append((time.perf_counter() - start) / STEPS * 1e6)
    return taken


def print_phases(plan: Plan, args: tuple[Any, ...], capacity: int) -> None:
    step = jax.jit(kernels.build(plan, args[4].shape[0], capacity, args[0].dtype, traced=True))
    for _ in range(3):
        *_, times = jax.block_until_ready(step(*args))
    since = np.asarray(times).view(np.uint32).astype(np.int64)
    since = (since - since[:, :1].min()) / 1e3
    print(f"    {'ended':<10}{'first':>8}{'median':>8}{'last':>8}")
    for name, ended in zip(PHASES, since.T, strict=True):
        print(f"    {name:<10}{ended.min():>8.2f}{np.median(ended):>8.2f}{ended.max():>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["0.5b"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=FORMATS, default="bfloat16")
    parser.add_argument("--phases", action="store_true")
    args = parser.parse_args()

    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s; microseconds a step, medians of {args.rounds}")
    print(f"{'size':<6}{'rows':>6}{'context':>9}{'floor':>8}{'kernel':>8}{'GB/s':>7}")
    figures = {}
    for size, rows, context in itertools.product(args.sizes, args.rows, args.contexts):
        plan, capacity = plan_for(SIZES[size]), -(-(context + 1) // 256) * 256
        drawn = arguments(plan, rows, context, capacity, args.dtype)
        taken = microseconds(plan, drawn, capacity, args.rounds)
        read = drawn[0].nbytes + drawn[6].nbytes * context // capacity
        print(
            f"{size:<6}{rows:>6}{context:>9}{read / bandwidth * 1e6:>8.0f}{median(taken):>8.1f}"
            f"{read / median(taken) / 1e3:>7.0f}",
            flush=True,
        )
        figures[f"{size} {rows} {context}"] = [round(us, 1) for us in taken]
        if args.phases:
            print_phases(plan, drawn, capacity)
        del drawn
    print_record("gpu_decode_step", args, bandwidth, figures)


if __name__ == "__main__":
    main()
