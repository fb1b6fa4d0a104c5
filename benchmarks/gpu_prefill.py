"""Prefill speed through the scheduler on random weights.

    python -m benchmarks.gpu_prefill --size=0.5b --lengths=512,2048,8192,32000

A request asks for one token, which comes with a call of several decode steps. What that takes is
measured with a prompt of one token, and taken off.
"""

import argparse
import json
import time
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_decode import random_parameters
from benchmarks.gpu_requests import run
from benchmarks.random_model import SIZES
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.memory import peak_memory
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import Text
from qwen_jax.engine.weights import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--lengths", default="512,2048,8192,32000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", default="auto")
    args = parser.parse_args()

    config = SIZES[args.size]
    dtype = jnp.dtype(args.dtype)
    drawn = random_parameters(config, dtype, seed=time.time_ns() % 2**31)
    packed = prepare(config, drawn, dtype, args.implementation)
    engine = Engine(config, packed, implementation=args.implementation)
    rng = np.random.default_rng()
    weights = config.num_parameters * dtype.itemsize
    record: dict[str, object] = {"benchmark": "gpu_prefill", **vars(args)}
    scheduler, steps = Scheduler(engine), 0.0
    print(f"{'tokens':>8}{'request ms':>12}{'prefill ms':>12}{'tokens/s':>12}{'peak GB':>10}"
          f"   (weights {weights / 1e9:.2f} GB)")  # fmt: skip
    for length in (1, *map(int, args.lengths.split(","))):
        seconds = []
        for turn in range(args.rounds + 2):
            text = Text(rng.integers(0, config.vocab_size, length).tolist(), 1)
            taken = run(engine, [text], scheduler)
            if turn > 1:  # the first compiles, the second makes a CUDA graph
                seconds.append(taken)
        record[str(length)] = [round(s * 1e3, 2) for s in seconds]
        if length == 1:
            steps = median(seconds)
        alone, peak = median(seconds) - steps, peak_memory()[1]
        rate = f"{(length - 1) / alone:,.0f}" if length > 1 else ""
        print(f"{length:>8}{median(seconds) * 1e3:>12.1f}{alone * 1e3:>12.1f}{rate:>12}"
              f"{peak / 1e9:>10.2f}", flush=True)  # fmt: skip
    device = jax.devices()[0].device_kind
    print(json.dumps(record | {"device": device, "jax": jax.__version__}))


if __name__ == "__main__":
    main()
