"""What sampling costs a decode step, through `steps.step`, on random weights.

    python -m benchmarks.gpu_sampled_decode --sizes 0.5b 7b --batches 1 64

One table in one run: the same rows, a step of each kind after the other in turns, and what each
takes over a greedy step. All programs are compiled first. Ends with one line of JSON.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import jax

from benchmarks.gpu_decode import (
    DTYPE,
    STEPS,
    go_on,
    inputs_of,
    plan_of,
    program,
    random_parameters,
    shapes_of,
)
from benchmarks.random_model import SIZES
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.weights import prepare
from qwen_jax.model.cache import PAGE

CONTEXT = 128
QWEN = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
KINDS: dict[str, tuple[dict[str, Any], int | None]] = {
    "greedy": ({}, None),
    "temperature": ({"temperature": 1.0}, None),
    "top-p 0.8": ({"temperature": 1.0, "top_p": 0.8}, None),
    "Qwen's own": (QWEN, None),
    "log-probabilities of 5": ({}, 5),
}
"""Name to what every row asks, and how many log-probabilities."""


def measure(engine: Engine, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each kind, its rounds in turns with those of the others."""
    kinds = {kind: (Sampling(**asked), top) for kind, (asked, top) in KINDS.items()}

    def compiled(kind: str) -> Any:
        shapes = shapes_of(engine, batch, CONTEXT, *kinds[kind])
        return program(engine, shapes, plan_of(engine, *kinds[kind]))

    with ThreadPoolExecutor(len(KINDS)) as pool:
        programs = dict(zip(KINDS, pool.map(compiled, KINDS), strict=True))
    states = {kind: inputs_of(engine, batch, CONTEXT, *asked) for kind, asked in kinds.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):
        for kind in kinds:
            jax.block_until_ready(states[kind])
            began = time.perf_counter()
            states[kind] = go_on(engine, programs[kind], states[kind])
            if turn:  # the first warms up
                seconds[kind].append((time.perf_counter() - began) / STEPS)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["0.5b"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"microseconds a step, medians of {args.rounds}, and over a greedy step")
    print(f"{'size':<6}{'rows':>5}" + "".join(f"{kind:>24}" for kind in KINDS))
    figures: dict[str, Any] = {}
    for size in args.sizes:
        config = SIZES[size]
        drawn = random_parameters(config, DTYPE, time.time_ns() % 2**31)
        weights = prepare(config, drawn, DTYPE, "auto")
        engine = Engine(config, weights, slots=1, cache_tokens=PAGE)
        for batch in args.batches:
            us = {
                kind: median(taken) * 1e6
                for kind, taken in measure(engine, batch, args.rounds).items()
            }
            cells = (f"{value:>17.1f}{value / us['greedy']:>7.3f}" for value in us.values())
            print(f"{size:<6}{batch:>5}" + "".join(cells), flush=True)
            figures[f"{size} {batch}"] = {kind: round(value, 1) for kind, value in us.items()}
        del engine
    record = {"benchmark": "gpu_sampled_decode", "us": figures, "context": CONTEXT}
    versions = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps(record | vars(args) | versions))


if __name__ == "__main__":
    main()
