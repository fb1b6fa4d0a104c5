"""Decode and prefill on the CPU with matrices in their blocks, beside the same as numbers.

    python -m benchmarks.cpu_blocks M.gguf [--forms packed] [--rounds 3]

One form after another in one process; a model whose numbers don't fit is measured in blocks alone.
Prints a table and one JSON line. `python -m benchmarks.random_model` makes files of real sizes.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine.blocks import load_blocks
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.memory import peak_memory
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import Text
from qwen_jax.weights.loader import load_parameters, open_checkpoint

PROMPT, CONTEXT = 128, 1024


def generated(engine: Engine, tokens: list[int], count: int) -> float:
    """Seconds that a greedy text takes."""
    start = time.perf_counter()
    scheduler = Scheduler(engine)
    scheduler.add(Text(tokens, count))
    while not scheduler.idle:
        scheduler.turn()
    return time.perf_counter() - start


def main(path: Path, forms: list[str], rounds: int, tokens: int) -> None:
    rng = np.random.default_rng(0)
    rows = {}
    print(
        f"{'':<10}{'load s':>8}{'compile s':>11}{'prefill t/s':>13}{'decode t/s':>12}{'peak MB':>9}"
    )
    for form in forms:
        checkpoint, start = open_checkpoint(path), time.perf_counter()
        packed = form == "packed"
        weights = load_blocks(checkpoint) if packed else load_parameters(checkpoint, jnp.float32)
        engine = Engine(checkpoint.config, weights, slots=1, cache_tokens=CONTEXT)
        load = time.perf_counter() - start

        def prompt() -> list[int]:  # another each time: nothing is shared
            return rng.integers(0, checkpoint.config.vocab_size, PROMPT).tolist()  # noqa: B023

        compiled = generated(engine, prompt(), 1 + tokens)
        first = [generated(engine, prompt(), 1) for _ in range(rounds)]
        whole = [generated(engine, prompt(), 1 + tokens) for _ in range(rounds)]
        prefill, decode = median(first), median(whole) - median(first)
        _, peak = peak_memory()
        rows[form] = {
            "load": load,
            "compile": compiled - median(whole),
            "prefill": PROMPT / prefill,
            "decode": tokens / decode,
            "peak_mb": peak / 1e6,
        }
        print(
            f"{form:<10}{load:>8.1f}{rows[form]['compile']:>11.1f}{PROMPT / prefill:>13.1f}"
            f"{tokens / decode:>12.2f}{peak / 1e6:>9.0f}",
            flush=True,
        )
        del engine, weights
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    record = {"benchmark": "cpu_blocks", "file": path.name, "jax": jax.__version__}
    print(json.dumps(record | {"commit": commit.stdout.strip(), "forms": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--forms", nargs="+", default=["packed", "expanded"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    main(args.path, args.forms, args.rounds, args.tokens)
