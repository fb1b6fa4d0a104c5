"""One small step of the decode-step kernel of few rows, or of many, for compute-sanitizer.

    compute-sanitizer --kernel-name kns=decode_step python -m tests.gpu.small_step few
    compute-sanitizer --kernel-name kns=decode_step --tool racecheck python -m tests.gpu.small_step many

Two layers, in which no place in shared memory is used twice: where one is, racecheck doesn't see
that one lane arrives for its warp at an mbarrier. Under pytest compute-sanitizer itself crashes.
"""  # noqa: E501

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_step import Plan, Shape
from pallas_kernels.decode_step import mosaic_gpu as few
from pallas_kernels.decode_step.batched import mosaic_gpu as many

SHAPE = Shape(layers=2, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocab=1024, eps=1e-6)
CAPACITY = 1024
DTYPE = jnp.dtype(jnp.bfloat16)
POSITIONS = {"few": [700, CAPACITY - 1, 3], "many": [*range(18), 700, CAPACITY - 1]}
"""Texts of one slot, of several blocks' splits, and up to the cache's end."""


def step(kernel: str) -> tuple[Callable[..., Any], list[Any]]:
    """The kernel and random arguments for it."""
    position = np.array(POSITIONS[kernel], np.int32)
    plan, rows, rng = Plan(SHAPE, blocks=132), len(position), np.random.default_rng()

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    tape = 0.05 * normal(plan.tape_tiles, 8, 256)
    cache = normal(2 * SHAPE.layers, rows, SHAPE.kv_heads, CAPACITY, SHAPE.head_dim)
    arguments = [
        tape.astype(DTYPE),
        np.asarray(plan.table()),
        normal(SHAPE.layers, SHAPE.qkv),
        1 + 0.1 * normal(2 * SHAPE.layers + 1, SHAPE.hidden),
        normal(rows, SHAPE.hidden),
        normal(rows, 2, SHAPE.head_dim // 2),
        cache.astype(DTYPE),
        position,
    ]
    build = {"few": few.build, "many": many.build}[kernel]
    return build(plan, rows, CAPACITY, DTYPE), arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", choices=POSITIONS)
    function, arguments = step(parser.parse_args().kernel)
    logits, new, _ = jax.block_until_ready(jax.jit(function)(*arguments))
    print("finite:", bool(jnp.isfinite(logits).all() & jnp.isfinite(new).all()))


if __name__ == "__main__":
    main()
