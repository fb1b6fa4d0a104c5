"""Errors of a decode step's logits on a quantised file, beside float64 on the file's own numbers.

    python -m benchmarks.step_errors --model 0.5b:Q4_K_M --write errors.npz   # float64, llama.cpp
    python -m benchmarks.step_errors --model 0.5b:Q4_K_M --read errors.npz    # the engine, on a GPU

Every row is a text of one token, so that nothing but the step's own arithmetic is in its logits:
no key of an earlier position has been rounded. The file is random, the same in both runs by its
seed. llama.cpp, which rounds what blocks are multiplied with to blocks of 8 bits, runs where
llama-cpp-python is installed. Ends with one line of JSON.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from benchmarks.random_model import SIZES, write
from qwen_jax import api
from qwen_jax.accuracy.exact.forward import forward
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.engine.engine import Engine
from qwen_jax.model.cache import Cache, create_pages
from qwen_jax.weights.checkpoint import Checkpoint, open_checkpoint

FORMS = ("packed", "expanded")


def exact(checkpoint: Checkpoint, token: int) -> Float[np.ndarray, " V"]:
    """A token's logits in float64."""
    source = CheckpointSource(checkpoint)
    (found,) = (value for name, value in forward(source, [token]) if name == "logits")
    return np.asarray(found, np.float64)[0]


def of_llamacpp(checkpoint: Checkpoint, token: int) -> Float[np.ndarray, " V"]:
    from qwen_jax.accuracy.references import llamacpp

    trace = llamacpp.trace(checkpoint, [token], names="logits")
    return np.asarray(trace.tensors["logits"], np.float64)[0]


def of_step(engine: Engine, tokens: list[int]) -> Float[np.ndarray, "rows V"]:
    """The logits of a step whose rows are those tokens, each the first of its text."""
    rows = len(tokens)
    pages = create_pages(engine.config, 1 + rows, engine.spec.cache)
    tables = 1 + jnp.arange(rows, dtype=jnp.int32)[:, None]

    @jax.jit
    def step(weights: object, pages: jax.Array, token: jax.Array) -> jax.Array:
        run = weights.forward(engine.spec, rows)  # type: ignore[attr-defined]
        nothing, live = jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool)
        found: jax.Array = run(token, Cache(pages, tables), nothing, live)[0]
        return found

    return np.asarray(step(engine.weights, pages, jnp.asarray(tokens, jnp.int32)), np.float64)


def errors(
    found: Float[np.ndarray, "rows V"], truth: Float[np.ndarray, "rows V"]
) -> Iterator[float]:
    """Of each row, root mean square, as a part of its logits'."""
    for mine, right in zip(found, truth, strict=True):
        yield float(np.linalg.norm(mine - right) / np.linalg.norm(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="0.5b:Q4_K_M")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--write", type=Path, help="float64's and llama.cpp's logits go there")
    which.add_argument("--read", type=Path, help="a file that --write made")
    args = parser.parse_args()

    size, kind = args.model.split(":")
    held = dict(np.load(args.read)) if args.read else {}
    seed = int(held["seed"]) if args.read else time.time_ns() % 2**31
    record = {"benchmark": "step_errors", "model": args.model, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.gguf"
        write(path, SIZES[size], seed, kind)
        if args.write:
            tokens = np.random.default_rng(seed).integers(0, 1000, max(args.rows))
            checkpoint = open_checkpoint(path)
            held = {"seed": np.int64(seed), "tokens": tokens}
            held["truth"] = np.stack([exact(checkpoint, int(t)) for t in tqdm(tokens)])
            if importlib.util.find_spec("llama_cpp"):
                found = np.stack([of_llamacpp(checkpoint, int(t)) for t in tokens])
                held["llamacpp"] = np.asarray([*errors(found, held["truth"])])
            np.savez(args.write, **held)
        else:
            for form in FORMS:
                engine = api.load(path, weights=form).engine
                for rows in args.rows:
                    tokens = held["tokens"][:rows].tolist()
                    each = [*errors(of_step(engine, tokens), held["truth"][:rows])]
                    record[f"{form}, {rows} rows"] = each
                    print(f"{form:<10}{rows:>4} rows  {np.median(each):.2e}  {max(each):.2e}")
                del engine
    if "llamacpp" in held:
        median, most = np.median(held["llamacpp"]), held["llamacpp"].max()
        print(f"{'llama.cpp':<19}  {median:.2e}  {most:.2e}")
        record["llamacpp"] = held["llamacpp"].tolist()
    record |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
