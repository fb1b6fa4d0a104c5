"""Prefill attention on a GPU: the kernel, the XLA reference and the matrix product's own rate.

python -m benchmarks.gpu_prefill_attention --sizes=0.5b,1.5b,7b

A chunk of 512 queries ends at each context; `whole` is one call with all of the context's
queries. FLOPs are counted causal: 4 N H for each slot a query sees. The queries of a repeat
are the output of the one before, so that no repeat can be left out.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels
from benchmarks.random_model import SIZES

CHUNK = 512


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
    parser.add_argument("--contexts", default="512,2048,8192,32768")
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
        f"{'size':>6}{'queries':>9}{'context':>9}{'us':>9}{'XLA us':>9}{'TFLOP/s':>9}{'share':>7}"
    )
    cases = [(CHUNK, int(context)) for context in args.contexts.split(",")]
    for size in args.sizes.split(","):
        config = SIZES[size]
        for queries, context in [*cases, (args.whole, args.whole)]:
            q = normal(seed, (1, queries, config.num_heads, config.head_dim))
            cache = (1, config.num_kv_heads, context, config.head_dim)
            # Large values: an average of thousands of them is a query of usual size again.
            k, v = normal(seed + 1, cache), normal(seed + 2, cache, 32.0)
            where = jnp.array([context - queries], jnp.int32), jnp.array([context], jnp.int32)
            slots = sum(range(context - queries + 1, context + 1))
            flops = 4 * config.num_heads * config.head_dim * slots
            times = {}
            for name in ("mosaic_gpu", "xla"):

                def call(q: Any, *rest: Any, name: str = name) -> Any:
                    return pallas_kernels.gqa_prefill_attention(q, *rest, implementation=name)

                repeats = max(2, min(200, int(1e13 / flops)) if name == "mosaic_gpu" else 3)
                times[name] = microseconds(call, q, k, v, *where, repeats=repeats)
            ours, xla = median(times["mosaic_gpu"]), median(times["xla"])
            rate = flops / ours / 1e6
            print(
                f"{size:>6}{queries:>9}{context:>9}{ours:>9.1f}{xla:>9.0f}{rate:>9.0f}"
                f"{rate / peak:>7.1%}",
                flush=True,
            )
            record[f"{size} {queries}@{context}"] = {
                "us": [round(t, 1) for t in times["mosaic_gpu"]],
                "xla_us": [round(t, 1) for t in times["xla"]],
                "share": round(rate / peak, 3),
            }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
