"""What sampling costs a decode step, end to end through `engine.decode_many`, on random weights.

    python -m benchmarks.gpu_sampled_decode --sizes 0.5b 7b --batches 1 64

One table in one run: the same rows, a step of each kind after the other in turns, and what each
takes over a greedy step. All programs are compiled first. Ends with one line of JSON.
"""

import argparse
import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_decode import DTYPE, STEPS, random_parameters, rows_of, slots
from benchmarks.random_model import SIZES
from pallas_kernels.sample_tokens import Counts, pack
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling, plan_rows
from qwen_jax.engine.steps import Rows
from qwen_jax.engine.weights import prepare

CONTEXT = 128
QWEN = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "temperature": ({"temperature": 1.0}, {}),
    "top-p 0.8": ({"temperature": 1.0, "top_p": 0.8}, {}),
    "Qwen's own": (QWEN, {}),
    "log-probabilities of 5": ({}, {"top_logprobs": 5}),
}
"""Name to what every row asks, and what a run asks of the plan."""


def planned(engine: Engine, batch: int, kind: str) -> tuple[Any, Any]:
    asked, wanted = KINDS[kind]
    rows = [Sampling(**asked, seed=row) for row in range(batch)]
    return plan_rows(rows, engine.config.vocab_size, **wanted)


def start(engine: Engine, batch: int, capacity: int, plan: Any) -> Rows:
    """Rows of `CONTEXT` random tokens each."""
    rows = rows_of(engine, batch, CONTEXT, capacity)
    if not plan.penalties:
        return rows
    vocab, rng = engine.config.vocab_size, np.random.default_rng()
    seen = pack([rng.integers(vocab, size=CONTEXT) for _ in range(batch)], vocab)
    counts = Counts(jnp.asarray(seen), jnp.zeros((batch, vocab), jnp.int32))
    return dataclasses.replace(rows, counts=counts)


def measure(engine: Engine, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each kind, its rounds in turns with those of the others."""
    capacity = slots(CONTEXT, rounds)
    kinds = {kind: planned(engine, batch, kind) for kind in KINDS}
    decode: Any = engine._decode

    def compiled(kind: str) -> Any:
        plan, numbers = kinds[kind]
        rows = jax.eval_shape(lambda: start(engine, batch, capacity, plan))
        return decode.lower(engine.weights, rows, numbers, plan, STEPS).compile()

    with ThreadPoolExecutor(len(KINDS)) as pool:
        programs = dict(zip(KINDS, pool.map(compiled, KINDS), strict=True))
    states = {kind: start(engine, batch, capacity, plan) for kind, (plan, _) in kinds.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):
        for kind, (_, numbers) in kinds.items():
            jax.block_until_ready(states[kind])
            began = time.perf_counter()
            states[kind], emitted = programs[kind](engine.weights, states[kind], numbers)
            jax.block_until_ready(emitted)
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
        engine = Engine(config, prepare(config, drawn, DTYPE, "auto"))
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
