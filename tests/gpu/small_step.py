"""One small step of the decode-step kernel of few rows, or of many, for compute-sanitizer.

    compute-sanitizer --kernel-name kns=decode_step python -m tests.gpu.small_step few
    compute-sanitizer --kernel-name kns=decode_step --tool racecheck python -m tests.gpu.small_step many

Two layers, in which no place in shared memory is used twice: where one is, racecheck doesn't see
that one lane arrives for its warp at an mbarrier. Under pytest compute-sanitizer itself crashes.
"""  # noqa: E501

import argparse
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.decode_step import decode_step
from pallas_kernels.target import HOPPER
from tests.kernels.emulated_step import SMALL, Case, drawn

TABLE = 8
"""Pages of a row."""
LAST = TABLE * 128 - 1
POSITIONS = {"few": [700, LAST, 3], "many": [*range(18), 700, LAST]}
"""Rows of one slot, of several blocks' splits, and up to the last page's end."""


def step(case: Case) -> tuple[jax.Array, jax.Array]:
    run = functools.partial(decode_step, plan=case.plan, implementation="mosaic_gpu")
    inputs = case._asdict()
    del inputs["plan"]
    return jax.jit(run)(**inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", choices=POSITIONS)
    positions = POSITIONS[parser.parse_args().kernel]
    case = drawn(SMALL, HOPPER.multiprocessors, positions, TABLE, shared=1)
    print("finite:", all(bool(jnp.isfinite(x).all()) for x in step(case)))


if __name__ == "__main__":
    main()
