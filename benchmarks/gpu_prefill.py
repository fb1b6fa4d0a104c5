"""Prefill speed through the scheduler, first token included, on random weights.

python -m benchmarks.gpu_prefill --size=0.5b --lengths=512,2048,8192,32000
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
    print(
        f"{'tokens':>8}{'tokens/s':>12}{'ms':>10}{'peak GB':>10}   (weights {weights / 1e9:.2f} GB)"
    )
    for length in map(int, args.lengths.split(",")):
        seconds = []
        for turn in range(args.rounds + 1):
            text = Text(rng.integers(0, config.vocab_size, length).tolist(), 1)
            taken = run(engine, [text])
            if turn:  # the first compiles
                seconds.append(taken)
        rate, peak = length / median(seconds), peak_memory()[1]
        print(
            f"{length:>8}{rate:>12,.0f}{median(seconds) * 1e3:>10.1f}{peak / 1e9:>10.2f}",
            flush=True,
        )
        record[str(length)] = [round(s * 1e3, 2) for s in seconds]
    device = jax.devices()[0].device_kind
    print(json.dumps(record | {"device": device, "jax": jax.__version__}))


if __name__ == "__main__":
    main()
