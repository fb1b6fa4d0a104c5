"""Prefill attention on a GPU: the kernel, the XLA reference and the matrix product's own rate.

python -m benchmarks.gpu_prefill_attention --sizes=0.5b,1.5b,7b

As the engine calls it: rows are consecutive chunks of one text, the last of which ends at the
context, and block tables cover 32,768 slots; `whole` is one call with all of the context's queries
in a row. FLOPs are counted causal: 4 N H for each slot a query sees. The queries of a repeat are
the output of the one before, so that no repeat can be left out. `--splits` cuts the slots into so
many parts, whatever the kernel would choose.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.random_model import SIZES
from pallas_kernels.gqa_prefill_attention import mosaic_gpu, reference
from pallas_kernels.gqa_prefill_attention.tiling import Shape, best_tiling

CHUNK, PAGE, ENTRIES = 128, 128, 256


def microseconds(call: Callable[..., Any], q: jax.Array, *rest: Any, repeats: int) -> list[float]:
    """Of one of `repeats` calls in a program, each on the output of the last; five programs."""
    program = jax.jit(lambda q, *rest: lax.fori_loop(0, repeats, lambda _, x: call(x, *rest), q))
    times = []
    for turn in range(6):
        start = time.perf_counter()
        program(q, *rest).block_until_ready()
        if turn:  # the first compiles
            times.append((time.perf_counter() - start) / repeats * 1e6)
    return times


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def matmul_rate(seed: int, n: int = 8192) -> float:
    x, y = normal(seed, (n, n)), normal(seed + 1, (n, n), n**-0.5)
    return 2 * n**3 / median(microseconds(jnp.matmul, x, y, repeats=10)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="0.5b,1.5b,7b")
    parser.add_argument("--contexts", default="128,512,2048,8192,32768")
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--splits", type=int, help="instead of the kernel's own choice")
    parser.add_argument("--whole", type=int, default=8192, help="context of the whole call")
    args = parser.parse_args()

    seed = time.time_ns() % 2**31
    peak = matmul_rate(seed)
    record: dict[str, Any] = {
        "benchmark": "gpu_prefill_attention",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_tflops": round(peak, 1),
    }
    print(f"bf16 product of 8192 x 8192 matrices: {peak:.0f} TFLOP/s")
    print(
        f"{'size':>6}{'rows':>6}{'queries':>9}{'context':>9}{'splits':>8}{'us':>9}{'XLA us':>9}"
        f"{'TFLOP/s':>9}{'share':>7}"
    )
    cases = [
        (rows, CHUNK, context)
        for rows in map(int, args.rows.split(","))
        for context in map(int, args.contexts.split(","))
        if rows * CHUNK <= context
    ]
    for size in args.sizes.split(","):
        config = SIZES[size]
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        for rows, queries, context in [*cases, (1, args.whole, args.whole)]:
            q = normal(seed, (rows, queries, heads, dim))
            needed = -(-context // PAGE)
            # Large values: an average of thousands of them is a query of usual size again.
            values = jnp.arange(2 * needed)[:, None, None, None] >= needed
            pages = normal(seed + 1, (2 * needed, kv_heads, PAGE, dim)) * jnp.where(values, 32, 1)
            order = jax.random.permutation(jax.random.key(seed), needed)
            tables = jnp.full((2, rows, ENTRIES), -1)
            tables = tables.at[0, :, :needed].set(order).at[1, :, :needed].set(order + needed)
            offsets = context - queries * jnp.arange(rows, 0, -1)
            rest = pages.astype(q.dtype), *tables, offsets, jnp.full(rows, context)
            slots = sum(range(context - rows * queries + 1, context + 1))
            flops = 4 * heads * dim * slots
            tiling = best_tiling(Shape(rows, queries, heads, kv_heads, ENTRIES * PAGE, dim))
            tiling = dataclasses.replace(tiling, splits=args.splits or tiling.splits)
            repeats = max(2, min(200, int(1e13 / flops)))
            kernel = functools.partial(mosaic_gpu.gqa_prefill_attention, tiling=tiling)
            times = {
                "kernel": microseconds(kernel, q, *rest, repeats=repeats),
                "xla": microseconds(reference, q, *rest, repeats=3),
            }
            ours, xla = median(times["kernel"]), median(times["xla"])
            rate = flops / ours / 1e6
            print(
                f"{size:>6}{rows:>6}{queries:>9}{context:>9}{tiling.splits:>8}{ours:>9.1f}{xla:>9.0f}"
                f"{rate:>9.0f}{rate / peak:>7.1%}",
                flush=True,
            )
            record[f"{size} {rows}x{queries}@{context}"] = {
                "splits": tiling.splits,
                "us": [round(t, 1) for t in times["kernel"]],
                "xla_us": [round(t, 1) for t in times["xla"]],
                "share": round(rate / peak, 3),
            }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
