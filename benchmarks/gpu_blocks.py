"""A quantised file on a GPU: its blocks multiplied as they are, beside numbers made of them.

    python -m benchmarks.gpu_blocks [--models 0.5b:Q8_0 0.5b:Q4_K_M 7b:Q4_K_M] [--rows 1 8]

Writes random models, which leaves them in the page cache, and loads each in both forms: seconds
(the second time, when programs are compiled), bytes on the device, and the time of a decode step
through the engine with greedy choice, as in `gpu_decode`. Errors are those of the last 64 of 512
positions' logits (prefill's), beside the file's numbers in float32 with products by XLA at highest
precision. Ends with one line of JSON.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from benchmarks.gpu_decode import (
    Case,
    copy_bandwidth,
    plan_of,
    print_record,
    program,
    seconds_a_step,
    shapes_of,
)
from benchmarks.random_model import SIZES, write
from qwen_jax import api
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling

FORMS = ("expanded", "packed")
TOKENS = 512


def load(path: Path, form: str, **how: Any) -> tuple[Engine, float]:
    """The engine, and seconds until its weights are there, with the programs of a load compiled."""
    for turn in range(2):
        start = time.perf_counter()
        engine = api.load(path, weights=form, **how).engine
        jax.block_until_ready(engine.weights)
        seconds = time.perf_counter() - start
        if turn == 0:
            del engine
    return engine, seconds


def error(engine: Engine, tokens: list[int], truth: np.ndarray) -> float:
    """Of the logits, root mean square, as a part of theirs."""
    found = engine.logits(tokens)[-64:].astype(np.float64)
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["0.5b:Q8_0", "0.5b:Q4_K_M", "7b:Q4_K_M"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--no_errors", action="store_true", help="leave out the errors of logits")
    args = parser.parse_args()
    args.temperature = 0.0

    bandwidth, figures = copy_bandwidth(), {}
    print(f"{'model':<13}{'form':<10}{'load s':>8}{'GB':>7}{'error':>9}"
          + "".join(f"{f'{rows} rows':>9}" for rows in args.rows))  # fmt: skip
    for model in args.models:
        size, kind = model.split(":")
        args.folder.mkdir(parents=True, exist_ok=True)
        path = args.folder / f"{size}-{kind}.gguf"
        if not path.exists():
            write(path, SIZES[size], time.time_ns() % 2**31, kind)
        tokens = np.random.default_rng().integers(0, 1000, TOKENS).tolist()
        if not args.no_errors:
            exact = api.load(path, dtype="float32", implementation="xla", slots=1).engine
            truth = exact.logits(tokens)[-64:].astype(np.float64)
            del exact
        for form in args.forms:
            engine, seconds = load(path, form, slots=max(args.rows))
            held = sum(x.nbytes for x in jax.tree.leaves(engine.weights))
            off = float("nan") if args.no_errors else error(engine, tokens, truth)
            taken = {}
            for rows in args.rows:
                greedy = Sampling(0.0)
                inputs = shapes_of(engine, rows, 128, greedy)
                run = program(engine, inputs, plan_of(engine, greedy))
                taken[rows] = seconds_a_step(Case(form, rows, 128, engine, run), args)
            print(
                f"{model:<13}{form:<10}{seconds:>8.2f}{held / 1e9:>7.2f}{off:>9.1e}"
                + "".join(f"{median(us) * 1e6:>9.0f}" for us in taken.values()),
                flush=True,
            )
            figures[f"{model} {form}"] = {
                "seconds": round(seconds, 2),
                "bytes": held,
                "error": off,
                **{str(rows): [round(s * 1e6, 1) for s in us] for rows, us in taken.items()},
            }
            del engine
    args.folder = str(args.folder)
    print_record("gpu_blocks", args, bandwidth, figures)


if __name__ == "__main__":
    main()
