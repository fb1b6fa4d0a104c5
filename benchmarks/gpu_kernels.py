"""Each operation against its XLA reference and against its floor, in one run on a GPU.

    python -m benchmarks.gpu_kernels --operation gqa_decode_attention --size 0.5b 7b

The floor is the fewest bytes an operation must move over the bandwidth of a large copy measured
in the same run; "copy" is what XLA takes to copy as many bytes. Calls are chained on the device,
each taking the last one's output, and go round among input sets that together are larger than the
L2 cache (up to 8 sets: the shortest contexts stay in it). A minute or two. Prints one table, then
one JSON line.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels
from benchmarks.random_model import SIZES

DTYPE = jnp.dtype(jnp.bfloat16)
LARGER_THAN_L2 = 150e6
MOST_SETS = 8
PAGE, ENTRIES = 128, 256
"""Slots of a page, and pages of a block table: the engine's, for a context of 32,768."""
SECONDS_A_ROUND = 4e-3
ROUNDS = 5


@dataclasses.dataclass
class Case:
    """One operation at one shape.

    Attributes:
        state: what a call takes from the one before it, and returns.
        sets: further arguments, one tuple a set.
        call: (implementation, state, *set) -> state.
        moved: bytes a call must move.
    """

    operation: str
    size: str
    batch: int
    context: int
    state: Any
    sets: list[tuple[Any, ...]]
    call: Callable[..., Any]
    moved: int


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, DTYPE)


def rotations(moved: int) -> range:
    return range(min(MOST_SETS, 1 + int(LARGER_THAN_L2 / moved)))


def decode_attention(size: str, batch: int, context: int) -> Case:
    config = SIZES[size]
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    moved = 2 * 2 * batch * (kv_heads * context + heads) * dim
    lengths = jnp.full((batch,), context, jnp.int32)
    needed = -(-context // PAGE)
    places = jax.random.permutation(jax.random.key(98), 2 * batch * needed)
    tables = jnp.full((2, batch, ENTRIES), -1)
    k_tables, v_tables = tables.at[:, :, :needed].set(places.reshape(2, batch, needed))

    def call(implementation: str, q: Any, pages: Any) -> Any:
        return pallas_kernels.gqa_decode_attention(
            q, pages, k_tables, v_tables, lengths, implementation=implementation
        )

    sets = [(normal(i, places.size, kv_heads, PAGE, dim),) for i in rotations(moved)]
    q = normal(99, batch, heads, dim)
    return Case("gqa_decode_attention", size, batch, context, q, sets, call, moved)


def copy_of_as_many(case: Case) -> Case:
    numbers = max(1, case.moved // (2 * DTYPE.itemsize))
    sets = [(normal(i, numbers),) for i in rotations(case.moved)]

    def call(_: str, state: Any, x: Any) -> Any:
        return x + state[0]

    return dataclasses.replace(case, state=normal(99, numbers), sets=sets, call=call)


def rope(size: str, batch: int, steps: int) -> Case:
    config = SIZES[size]
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    positions = jnp.broadcast_to(jnp.arange(steps, dtype=jnp.int32), (batch, steps))
    inv_freq = config.rope_theta ** (-jnp.arange(dim // 2) / (dim // 2))

    def call(implementation: str, state: Any, offset: Any) -> Any:
        q, k = state
        return pallas_kernels.rope(
            q, k, positions + offset, inv_freq, implementation=implementation
        )

    state = normal(0, batch, steps, heads, dim), normal(1, batch, steps, kv_heads, dim)
    moved = 2 * sum(x.nbytes for x in state)
    return Case("rope", size, batch, steps, state, [(jnp.int32(i),) for i in range(4)], call, moved)


def cases(operation: str, sizes: list[str]) -> Iterator[Callable[[], Case]]:
    """The shapes of an operation; each is made when called, and freed before the next."""
    make: Callable[[str, int, int], Case]
    if operation == "gqa_decode_attention":
        grid = [(batch, context) for batch in (1, 8) for context in (128, 2048, 32768)]
        make = decode_attention
    else:
        grid, make = [(batch, steps) for batch in (1, 8) for steps in (1, 512)], rope
    for size in sizes:
        for shape in grid:
            yield functools.partial(make, size, *shape)


NUMBERS = ("floor_us", "copy_us", "xla_us", "kernel_us")
OPERATIONS = ("gqa_decode_attention", "rope")


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy far larger than the L2 cache."""
    x = jnp.ones(1 << 29, jnp.float32)
    copies = 20
    copy = jax.jit(
        lambda x: lax.fori_loop(0, copies, lambda i, x: lax.optimization_barrier(x + 1), x),
        donate_argnums=0,
    )
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes * copies / min(seconds)


def timed(case: Case, implementation: str, bandwidth: float) -> Callable[[], float]:
    """Compiles a chain of calls; the function returned measures the median seconds of one."""
    call = jax.jit(functools.partial(case.call, implementation))  # lowered once, not once a set
    turns = 1 + int(SECONDS_A_ROUND / (len(case.sets) * (5e-6 + case.moved / bandwidth)))

    def chain(state: Any, sets: list[tuple[Any, ...]]) -> Any:
        def turn(_: Any, state: Any) -> Any:
            for arguments in sets:
                # The barrier keeps XLA from making one kernel of several calls.
                state = lax.optimization_barrier(call(state, *arguments))
            return state

        return lax.fori_loop(0, turns, turn, state)

    compiled = jax.jit(chain).lower(case.state, case.sets).compile()

    def measure() -> float:
        seconds = []
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            jax.block_until_ready(compiled(case.state, case.sets))
            seconds.append((time.perf_counter() - start) / turns / len(case.sets))
        return median(seconds[1:])

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operation", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    args = parser.parse_args()

    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e9:.0f} GB/s\n")
    print("| operation | size | batch | context | floor us | copy us | XLA us | kernel us "
          "| floor / kernel | copy / kernel |")  # fmt: skip
    print("| --- " * 10 + "|")
    rows = []
    for make in (make for operation in args.operation for make in cases(operation, args.size)):
        case = make()
        with ThreadPoolExecutor() as pool:
            cases_and_names = (copy_of_as_many(case), case, case), ("xla", "xla", "mosaic_gpu")
            measures = list(pool.map(lambda c, n: timed(c, n, bandwidth), *cases_and_names))
        numbers = [1e6 * s for s in (case.moved / bandwidth, *(measure() for measure in measures))]
        floor, copy, xla, kernel = numbers
        print(
            f"| {case.operation} | {case.size} | {case.batch} | {case.context} | {floor:.2f} | "
            f"{copy:.2f} | {xla:.2f} | {kernel:.2f} | {floor / kernel:.0%} | {copy / kernel:.0%} |",
            flush=True,
        )
        row = [case.operation, case.size, case.batch, case.context, *(round(x, 2) for x in numbers)]
        rows.append(row)
    record = {
        "benchmark": "gpu_kernels",
        "copy_GB_s": round(bandwidth / 1e9),
        "columns": ["operation", "size", "batch", "context", *NUMBERS],
        "rows": rows,
        "dtype": "bfloat16",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print("\n" + json.dumps(record))


if __name__ == "__main__":
    main()
