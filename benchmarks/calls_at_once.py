"""Many calls of `agenerate` at once beside one call with a list of their prompts.

    python -m benchmarks.calls_at_once                      # the bundled model
    python -m benchmarks.calls_at_once --size 0.5b --calls 64 --tokens 256   # on a GPU

`apart` is the same with a scheduler for each call, as it would be if they didn't share one. The
three take turns. Ends with one line of JSON.
"""

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import jax
import numpy as np

from benchmarks import random_model
from qwen_jax import Sampling, api
from qwen_jax.engine.scheduler import Scheduler

KINDS = ("a list", "at once", "apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=random_model.SIZES, help="random weights; else bundled")
    parser.add_argument("--calls", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        if args.size:
            seed = time.time_ns() % 2**31
            random_model.write(path, random_model.SIZES[args.size], seed, "F16")
        model = api.load(path if args.size else api.BUNDLED)
    model.engine.compile()
    rng = np.random.default_rng()
    # None ends before it has all its tokens.
    no_end = dict.fromkeys(model.tokenizer.stop_ids, -np.inf)
    sampling = Sampling(logit_bias=no_end)

    def prompts() -> list[list[int]]:
        return rng.integers(0, 1500, (args.calls, 30)).tolist()

    async def at_once() -> None:
        asked = (model.agenerate(p, sampling=sampling, max_tokens=args.tokens) for p in prompts())
        await asyncio.gather(*asked)

    runs: dict[str, Callable[[], object]] = {
        "a list": lambda: model.generate(prompts(), sampling=sampling, max_tokens=args.tokens),
        "at once": lambda: asyncio.run(at_once()),
        "apart": lambda: asyncio.run(at_once()),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(args.rounds + 1):
        for kind in KINDS:
            with contextlib.ExitStack() as stack:
                if kind == "apart":
                    stack.enter_context(mock.patch("qwen_jax.generation.line_for", Scheduler))
                start = time.perf_counter()
                runs[kind]()
                if turn:  # the first may compile
                    seconds[kind].append(time.perf_counter() - start)
    count = args.calls * args.tokens
    figures = {kind: round(count / median(taken)) for kind, taken in seconds.items()}
    for kind, rate in figures.items():
        print(f"{kind:<8} {rate:>8,} tokens/s")
    record = {"benchmark": "calls_at_once", **vars(args), "tokens_per_s": figures}
    print(json.dumps(record | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}))


if __name__ == "__main__":
    main()
