"""How long decode steps take on several GPUs: the parts `--decode` and `--large` of
`benchmarks.gpu_mesh`."""

import argparse
import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import jax

from benchmarks.gpu_decode import (
    DTYPE,
    Case,
    plan_of,
    program,
    seconds_a_step,
    shapes_of,
)
from benchmarks.mesh_engines import (
    dealt,
    drawn_in_parts,
    on_one,
    on_several,
    packed_in_parts,
    packed_of,
    split_of,
)
from benchmarks.scaling import ALL
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.memory import free_memory
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.split_packed import refusal
from qwen_jax.model.cache import PAGE
from qwen_jax.scaling import step as modelled


def decode(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds a step of every engine."""
    split = split_of(args.tp)
    of_all = {"slots": 1, "cache_tokens": PAGE}
    weights = dealt(config, split)
    engines = {
        "one": on_one(config, "auto", **of_all),
        "one xla": on_one(config, "xla", **of_all),
        "tp": on_several(config, packed_of(config, weights), "mosaic_gpu", **of_all),
        "tp nccl": on_several(config, weights, "auto", **of_all),
        "tp xla": on_several(config, weights, "xla", **of_all),
    }
    return steps_of(config, engines, args)


def large(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same of a model that may be on no single GPU here; one after the other, since not all
    fit. Streams first: they want their memory in one piece."""
    config = ALL[size]
    split = split_of(args.tp)
    of_all = {"slots": 1, "cache_tokens": PAGE}
    makers: dict[str, Callable[[], Engine]] = {
        "tp": lambda: on_several(config, packed_in_parts(config, split), "mosaic_gpu", **of_all),
        "one": lambda: on_one(config, "auto", **of_all),
        "tp nccl": lambda: on_several(config, drawn_in_parts(config, split), "auto", **of_all),
    }
    figures: dict[str, Any] = {}
    if why := refusal(config, DTYPE, split.numbers):
        print(f"the decode step's kernel can't run on these: {why}")
        figures["kernel refused"] = why
        del makers["tp"]
    if 2 * config.num_parameters > free_memory():
        del makers["one"]
    for name, make in makers.items():
        start = time.perf_counter()
        engine = make()
        jax.block_until_ready(engine.weights)
        drawing = time.perf_counter() - start
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(engine.weights))
        print(f"{size}, {name}: {held / 1e9:.1f} GB a GPU, drawn in {drawing:.1f} s", flush=True)
        for case, taken in steps_of(config, {name: engine}, args).items():
            figures.setdefault(case, {}).update(taken)
        figures |= {f"{name} GB": held / 1e9, f"{name} drawing": drawing}
        del engine
        gc.collect()
    return figures


def steps_of(
    config: ModelConfig, engines: dict[str, Engine], args: argparse.Namespace
) -> dict[str, Any]:
    greedy = Sampling()
    wanted = [
        (name, batch, context)
        for context in args.contexts
        for batch in args.batches
        for name in engines
    ]

    def compiled(one: tuple[str, int, int]) -> Case:
        name, batch, context = one
        engine = engines[name]
        inputs = shapes_of(engine, batch, context, greedy)
        run = program(engine, inputs, plan_of(engine, greedy))
        return Case(name, batch, context, engine, run)

    kernel = refusal(config, DTYPE, range(args.tp)) is None
    start = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        cases = list(pool.map(compiled, wanted))
    print(f"{len(cases)} programs compiled in {time.perf_counter() - start:.0f} s")
    names = list(engines)
    print("rows context  " + "".join(f"{name:>9}" for name in names) + "  docs/scaling.md, tp")
    figures: dict[str, Any] = {}
    settings = argparse.Namespace(temperature=0.0, rounds=args.rounds)
    for context in args.contexts:
        for batch in args.batches:
            these = [c for c in cases if (c.batch, c.context) == (batch, context)]
            times = {case.implementation: seconds_a_step(case, settings) for case in these}
            here = modelled(config, DTYPE, args.tp, batch, context, kernel=kernel)
            cells = "".join(f"{median(times[name]) * 1e6:>9,.0f}" for name in names)
            print(f"{batch:>4}{context:>8}  {cells}{here.seconds * 1e6:>12,.0f} µs", flush=True)
            figures[f"{batch} {context}"] = {
                name: [round(s * 1e6, 1) for s in taken] for name, taken in times.items()
            }
    return figures
