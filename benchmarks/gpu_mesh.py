"""A model on two GPUs beside the model on one, on random weights made on the devices.

    python -m benchmarks.gpu_mesh --decode           # 7B: a step of 1, 8 and 64 rows
    python -m benchmarks.gpu_mesh --collectives      # what docs/scaling.md assumes of them
    python -m benchmarks.gpu_mesh --exchange         # kernels that store into other GPUs' memory
    python -m benchmarks.gpu_mesh --same             # logits and greedy texts
    python -m benchmarks.gpu_mesh --prefill          # a prompt of 8,192 tokens
    python -m benchmarks.gpu_mesh --requests         # 384 requests: one GPU, dp=2, tp=2
    python -m benchmarks.gpu_mesh --load             # a file of 7B in Q8_0, as bfloat16
    python -m benchmarks.gpu_mesh --large 32b 72b    # which may not fit on one GPU

Any of these together run one after the other, each with a table of its own; each is a minute or
two, most of which is compilation. `one` is the engine on one GPU as it chooses, `one xla` its XLA
path, `tp` and `tp xla` the same on `--tp` GPUs; `tp nccl` has XLA's products and NCCL's sums
between kernels for attention. Ends with one line of JSON.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qwen_jax
from benchmarks.gpu_decode import DTYPE, STEPS, copy_bandwidth, random_parameters
from benchmarks.gpu_requests import lengths, requests, run
from benchmarks.mesh_engines import SEED, dealt, on_one, on_several, packed_of, split_of
from benchmarks.mesh_exchange import exchange
from benchmarks.mesh_steps import decode, large
from benchmarks.random_model import write
from benchmarks.scaling import ALL
from qwen_jax.config import ModelConfig
from qwen_jax.engine.compiling import Expected, compile_ahead
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.replicas import line_for
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.split_weights import SplitWeights, splits_of
from qwen_jax.engine.texts import Text
from qwen_jax.engine.weights import PlainWeights, Weights
from qwen_jax.mesh import MeshShape
from qwen_jax.model.split import AXIS

CACHE_TOKENS = 64 * 2048


def collectives(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of an all-reduce of hidden states and of a gather of logits, one after the other
    in one program, each waiting for the one before."""
    split = split_of(args.tp)
    figures: dict[str, Any] = {}
    times = 256

    def reduced(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: jax.lax.psum(x, AXIS) * 0.5, x)

    def gathered(x: jax.Array) -> jax.Array:
        def one(_: Any, x: jax.Array) -> jax.Array:
            whole = jax.lax.all_gather(x, AXIS, axis=1, tiled=True)
            return whole[:, : x.shape[1]] * 0.5 + whole[:, -x.shape[1] :]

        return jax.lax.fori_loop(0, times, one, x)

    part = config.vocab_size // args.tp
    for rows in (*args.batches, 2048):
        for name, function, shape, dtype in (
            ("all-reduce", reduced, (rows, config.hidden_size), DTYPE),
            ("all-gather", gathered, (rows, part), jnp.dtype(jnp.float32)),
        ):
            if name == "all-gather" and rows > 64:
                continue
            given = split.placed(jnp.ones(shape, dtype))
            compiled = jax.jit(split.over(function, (None,), None)).lower(given).compile()
            taken = []
            for turn in range(args.rounds + 1):
                start = time.perf_counter()
                jax.block_until_ready(compiled(given))
                if turn:
                    taken.append((time.perf_counter() - start) / times)
            sent = given.nbytes
            print(
                f"{name} of {rows} rows, {sent:,} bytes: {median(taken) * 1e6:.1f} µs", flush=True
            )
            figures[f"{name} {rows}"] = {"bytes": sent, "us": [round(s * 1e6, 2) for s in taken]}
    return figures


def generated(engine: Engine, prompt: list[int], count: int) -> list[int]:
    tokens = list[int]()
    with closing(line_for(engine)) as line:
        line.add(Text(prompt, count))
        while not line.idle:
            for news in line.turn():
                tokens += news.tokens
    return tokens


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def same(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Relative differences of logits, and how far greedy texts agree. Weights are bfloat16's
    numbers in both dtypes, so that one GPU in float32 is the reference of all."""
    split = split_of(args.tp)
    tokens = np.random.default_rng(SEED).integers(0, config.vocab_size, 64).tolist()
    options: dict[str, Any] = {"slots": 1, "cache_tokens": 1024}

    def wide() -> Iterator[tuple[str, jax.Array]]:
        for name, value in random_parameters(config, DTYPE, SEED):
            yield name, value.astype(jnp.float32)

    def engines() -> Iterator[tuple[str, Engine]]:
        plain = PlainWeights(dict(wide()))
        yield "one float32 xla", Engine(config, plain, implementation="xla", **options)
        weights: Weights = SplitWeights.deal(config, split, wide())
        for name in ("auto", "xla"):
            yield (
                f"tp float32 {name}",
                Engine(config, weights, implementation=name, split=split, **options),
            )
        del plain, weights
        gc.collect()
        yield "one bfloat16 auto", on_one(config, "auto", **options)
        yield "one bfloat16 xla", on_one(config, "xla", **options)
        halves = dealt(config, split)
        streams = packed_of(config, halves)
        yield "tp bfloat16 kernel", on_several(config, streams, "mosaic_gpu", **options)
        for name in ("auto", "xla"):
            yield f"tp bfloat16 {name}", on_several(config, halves, name, **options)

    exact, chosen = np.empty(0), [0]
    figures: dict[str, Any] = {}
    for name, engine in engines():
        logits, text = engine.logits(tokens), generated(engine, tokens, args.tokens)
        if not len(exact):
            exact, chosen = logits, text
        differing = [i for i, pair in enumerate(zip(text, chosen, strict=True)) if len({*pair}) > 1]
        first = min(differing, default=len(text))
        agreed = float(np.mean(logits.argmax(axis=-1) == exact.argmax(axis=-1)))
        error = relative(logits, exact)
        print(
            f"{name:<18} logits {error:.2e} off, {agreed:.0%} of the likeliest the same, greedy "
            f"{first} of {len(text)} tokens the same",
            flush=True,
        )
        figures[name] = {"logits": error, "likeliest": agreed, "greedy": first}
        del engine
        gc.collect()
    return figures


def prefill(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds from the prompt to the first token."""
    split = split_of(args.tp)
    options: dict[str, Any] = {"slots": 1, "cache_tokens": 2 * args.prompt}
    weights = dealt(config, split)
    engines = {
        "one": on_one(config, "auto", **options),
        "tp": on_several(config, packed_of(config, weights), "mosaic_gpu", **options),
        "tp nccl": on_several(config, weights, "auto", **options),
        "tp xla": on_several(config, weights, "xla", **options),
    }
    figures = {}
    for name, engine in engines.items():
        taken = []
        for turn in range(args.rounds + 1):
            text = requests([(args.prompt, 1)], config.vocab_size)
            seconds = run(engine, text)
            if turn:  # the first compiles
                taken.append(seconds)
        rate = args.prompt / median(taken)
        print(f"{name:<8}{median(taken) * 1e3:>9.1f} ms{rate:>10,.0f} tokens/s", flush=True)
        figures[name] = [round(s * 1e3, 2) for s in taken]
    return figures


def many(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds for requests of any length; with `dp` every model has half of the slots."""
    slots, options = args.slots, {"cache_tokens": CACHE_TOKENS}
    sizes = lengths(args.count)
    split = split_of(args.tp)
    _, *others = splits_of(MeshShape(dp=args.tp))

    def replicas() -> Engine:
        each = {"slots": slots // args.tp, **options}
        engine = on_one(config, "auto", **each)
        engine.others = tuple(
            Engine(config, there.placed(engine.weights), split=there, **each) for there in others
        )
        return engine

    kinds = {
        f"one, {slots // args.tp} slots": lambda: on_one(
            config, "auto", slots=slots // args.tp, **options
        ),
        f"dp={args.tp}, {slots} slots": replicas,
        f"tp={args.tp}, {slots} slots": lambda: on_several(
            config, packed_of(config, dealt(config, split)), "auto", slots=slots, **options
        ),
    }
    figures = {}
    for name, make in kinds.items():
        engine = make()
        start = time.perf_counter()
        compile_few(engine)
        compiling = time.perf_counter() - start
        taken = [run(engine, requests(sizes, config.vocab_size)) for _ in range(2)]
        answers = sum(answer for _, answer in sizes)
        print(
            f"{name:<18} compilation {compiling:.0f} s; {taken[0]:.2f} s, again {taken[1]:.2f}: "
            f"{answers / taken[1]:,.0f} answer tokens/s",
            flush=True,
        )
        figures[name] = {"compilation": compiling, "seconds": taken}
        del engine
        gc.collect()
    return figures


def compile_few(engine: Engine) -> None:
    """One program of each kind on every device, so that the first requests are timed, too."""
    for each in (engine, *engine.others):
        programs = Expected(each.shapes.slots, [(Sampling(), None)]).programs(each.layout)
        for future in compile_ahead(each.layout, each.weights, programs):
            future.result()
        each.expect(programs)


def load(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from a file in the page cache to weights on the devices; the first is left out."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write(path, config, 0, "Q8_0")
        for mesh in (None, f"tp={args.tp}", f"dp={args.tp}"):
            taken = []
            for turn in range(3):
                start = time.perf_counter()
                made = qwen_jax.load(path, mesh=mesh, weights="expanded", slots=1)
                engines = (made.engine, *made.engine.others)
                jax.block_until_ready([engine.weights for engine in engines])
                if turn:
                    taken.append(round(time.perf_counter() - start, 2))
                del made, engines
                gc.collect()
            print(f"{mesh or 'one GPU':<8} {min(taken):.2f} s", flush=True)
            figures[mesh or "one"] = taken
    return figures


PARTS = {
    "decode": decode,
    "collectives": collectives,
    "exchange": exchange,
    "same": same,
    "prefill": prefill,
    "requests": many,
    "load": load,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for part, function in PARTS.items():
        parser.add_argument(f"--{part}", action="store_true", help=function.__doc__)
    parser.add_argument("--large", choices=ALL, nargs="*", default=[], help=large.__doc__)
    parser.add_argument("--size", choices=ALL, default="7b", help="of all other parts")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of the greedy texts")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of --prefill")
    parser.add_argument("--slots", type=int, default=128, help="of --requests")
    parser.add_argument("--count", type=int, default=384, help="of --requests")
    args = parser.parse_args()
    chosen = [part for part in PARTS if getattr(args, part)]
    if not chosen and not args.large:
        parser.error(f"choose from {', '.join(f'--{part}' for part in PARTS)} and --large")

    config = ALL[args.size]
    record: dict[str, Any] = {"benchmark": "gpu_mesh", **vars(args), "steps a call": STEPS}
    for part in chosen:
        print(f"\n{part}: {args.size}, tp={args.tp}", flush=True)
        start = time.perf_counter()
        record[part] = PARTS[part](config, args)
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
        gc.collect()
    for size in args.large:
        print(f"\nlarge: {size}, tp={args.tp}", flush=True)
        record[size] = large(size, args)
        gc.collect()
    record["copy_gb_s"] = round(copy_bandwidth() / 1e9)
    versions = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print("\n" + json.dumps(record | versions))


if __name__ == "__main__":
    main()
