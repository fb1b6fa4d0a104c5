"""The decode-step kernel alone, on random weights of real shapes: time, and where it goes.

    python -m benchmarks.gpu_decode_step --sizes 0.5b 7b --rows 1 8 --contexts 128 --phases
    python -m benchmarks.gpu_decode_step --sizes 0.5b 7b --rows 1 4 --stored q8_0 q4_k_m

Steps are chained on the device, each taking the last one's logits. With `--phases` a traced
kernel runs besides: when the blocks ended each phase of the last layer, in microseconds after the
first of them began it. Pages lie in any order; a row's block table has room for `--slots`, however
few of them it needs. Half a minute. Ends with one line of JSON.
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
from benchmarks.random_model import MIXED, SIZES, type_of
from pallas_kernels.decode_step import StepPlan, Stored, kernels
from pallas_kernels.decode_step.common.cache import FEWEST_SLOTS, Pool
from pallas_kernels.decode_step.common.trace import PHASES
from pallas_kernels.decode_step.packed.plain import Numbers
from pallas_kernels.decode_step.packed.storages import STORAGES
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE
from pallas_kernels.decode_step.ptx.formats import FORMATS
from qwen_jax.engine.weights import plan_for

STEPS = 64


def pages_of(context: int) -> int:
    """Pages that a row attends to."""
    return -(-context // FEWEST_SLOTS)


def plan_as(size: str, stored: str) -> StepPlan:
    """All matrices in one storage, or as llama.cpp mixes types for that quantisation."""
    config = SIZES[size]
    plan = plan_for(config, stored if stored in STORAGES else "bfloat16")
    if stored in STORAGES:
        return plan

    def name(tensor: str, columns: int) -> str:
        return type_of(tensor, columns, config, stored.upper()).name.lower()

    d, heads, ffn = config.hidden_size, config.num_heads * config.head_dim, config.ffn_size
    inputs = {
        "attn_q": d,
        "attn_k": d,
        "attn_v": d,
        "attn_output": heads,
        "ffn_up": d,
        "ffn_down": ffn,
    }
    layers = tuple(
        Stored(*(name(f"blk.{i}.{tensor}.weight", width) for tensor, width in inputs.items()))
        for i in range(config.num_layers)
    )
    head = name("token_embd.weight" if config.tied else "output.weight", d)
    return StepPlan(plan.shape, plan.blocks, layers, head)


def random_stream(key: Any, plan: StepPlan) -> jax.Array:
    """64 MiB, again and again: numbers of about 0.02, or any codes with small scales."""
    granules, words = plan.stream_shape
    drawn = min(2**26 // plan.granule_bytes, granules)
    if len(plan.storages) == 1 and isinstance(plan.storages[0], Numbers):
        tiles = jax.random.normal(key, (drawn, M_TILE, K_TILE), jnp.float32) * 0.02
        some = plan.storages[0].words(tiles)
    else:
        # Of every half two exponent bits cleared: no float16 is more than 2^-7.
        some = jax.random.bits(key, (drawn, words), jnp.uint32) & np.uint32(0x9FFF_9FFF)
    return jnp.tile(some, (-(-granules // drawn), 1))[:granules]


def arguments(plan: StepPlan, rows: int, context: int, pool: Pool) -> tuple[Any, ...]:
    """What the kernel takes, drawn afresh; the weight stream repeats 64 MiB.

    The cache has the dtype of weights that are numbers of 16 bits, or else bfloat16.
    """
    shape, seed = plan.shape, time.time_ns() % 2**31
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    # A row's entries that it doesn't need name no page.
    tables = np.full((rows, pool.table), -1, np.int32)
    needed = pages_of(context)
    order = np.random.default_rng(seed).permutation(pool.pages)[: rows * needed]
    tables[:, :needed] = order.reshape(rows, needed)

    def normal(*dims: int, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.normal(next(keys), dims, dtype)

    pages = (2 * shape.layers, pool.pages, shape.kv_heads, pool.slots, shape.head_dim)
    return (
        jax.jit(random_stream, static_argnums=1)(next(keys), plan),
        jnp.asarray(plan.table()),
        normal(shape.layers, shape.qkv),
        1 + 0.1 * normal(2 * shape.layers + 1, shape.hidden),
        normal(rows, shape.hidden),
        normal(rows, 2, shape.head_dim // 2),
        normal(*pages, dtype=plan.head if plan.head in FORMATS else jnp.bfloat16),
        jnp.asarray(tables),
        jnp.full((rows,), context, jnp.int32),
    )


def microseconds(plan: StepPlan, args: tuple[Any, ...], pool: Pool, rounds: int) -> list[float]:
    """A step's time, in every round of a chain."""
    step = kernels.build(plan, args[4].shape[0], pool, args[6].dtype)

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


def print_phases(plan: StepPlan, args: tuple[Any, ...], pool: Pool) -> None:
    step = jax.jit(kernels.build(plan, args[4].shape[0], pool, args[6].dtype, traced=True))
    for _ in range(3):
        *_, times = jax.block_until_ready(step(*args))
    since = np.asarray(times).view(np.uint32).astype(np.int64)
    since = (since - since[:, :1].min()) / 1e3
    print(f"    {'ended':<16}{'first':>8}{'median':>8}{'last':>8}")
    for name, ended in zip(PHASES, since.T, strict=True):
        print(f"    {name:<16}{ended.min():>8.2f}{np.median(ended):>8.2f}{ended.max():>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["0.5b"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128])
    parser.add_argument("--slots", type=int, default=32768, help="of a row, at most")
    parser.add_argument("--rounds", type=int, default=5)
    stored = [*(name for name, storage in STORAGES.items() if storage.format), MIXED.lower()]
    parser.add_argument("--stored", choices=stored, nargs="+", default=["bfloat16"])
    parser.add_argument("--phases", action="store_true")
    args = parser.parse_args()

    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e9:.0f} GB/s; microseconds a step, medians of {args.rounds}")
    print(f"{'size':<6}{'stored':<9}{'rows':>6}{'context':>9}{'floor':>8}{'kernel':>8}{'GB/s':>7}")
    figures = {}
    cases = itertools.product(args.sizes, args.rows, args.contexts, args.stored)
    for size, rows, context, stored in cases:
        plan = plan_as(size, stored)
        # The token's own page may be one more.
        table = max(pages_of(args.slots), pages_of(context + 1))
        pool = Pool(max(1, rows * pages_of(context)), FEWEST_SLOTS, table)
        drawn = arguments(plan, rows, context, pool)
        taken = microseconds(plan, drawn, pool, args.rounds)
        attended = drawn[6].nbytes // (pool.pages * pool.slots) * rows * context
        read = drawn[0].nbytes + attended
        print(
            f"{size:<6}{stored:<9}{rows:>6}{context:>9}{read / bandwidth * 1e6:>8.0f}"
            f"{median(taken):>8.1f}{read / median(taken) / 1e3:>7.0f}",
            flush=True,
        )
        figures[f"{size} {stored} {rows} {context}"] = [round(us, 1) for us in taken]
        if args.phases:
            print_phases(plan, drawn, pool)
        del drawn
    print_record("gpu_decode_step", args, bandwidth, figures)


if __name__ == "__main__":
    main()
