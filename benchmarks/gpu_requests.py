"""Requests of any length through the scheduler, as a user's file of prompts brings them.

    python -m benchmarks.gpu_requests --sizes 0.5b 7b

384 prompts of 20 to 900 random tokens, answers of 16 to 512, random weights, 64 slots: first time,
again, and in other orders, in one process whose programs are compiled before. Beside it what it
could take: the prompts' tokens at the rate of prompts alone, and the answers' at the rate of 64
rows of equal texts, both measured here through the same programs. The seed of the lengths is fixed;
tokens and weights are drawn afresh.

`--few_shot`: 1,000 questions of 30 tokens behind one beginning of 2,000, answers of 8, and the same
where each begins with a token of its own. `--varied`: 2,000 requests that ask for anything, with
the device's memory and the number of programs before and after. Ends with one line of JSON.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.gpu_decode import DTYPE, random_parameters
from benchmarks.random_model import SIZES
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.replicas import line_for
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.shared import Client
from qwen_jax.engine.texts import Text
from qwen_jax.engine.weights import prepare

SEED = 17
GREEDY = Sampling()
QWEN = Sampling(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)


PROGRAMS: dict[str, Any] = {"extend": steps.extend, "step": steps.step, "insert": steps.insert}


def lengths(count: int) -> list[tuple[int, int]]:
    """Of prompts and of answers, of which most are short."""
    rng = np.random.default_rng(SEED)
    answers = (16 + 497 * rng.random(count) ** 2).astype(int)
    return list(zip(rng.integers(20, 901, count).tolist(), answers.tolist(), strict=True))


def requests(
    sizes: Sequence[tuple[int, int]], vocab: int, sampling: Sampling = GREEDY
) -> list[Text]:
    """Drawn afresh, so that no prompt is in the cache already."""
    rng = np.random.default_rng()
    return [
        Text(rng.integers(0, vocab, prompt).tolist(), answer, sampling) for prompt, answer in sizes
    ]


def run(engine: Engine, texts: Sequence[Text], scheduler: Scheduler | None = None) -> float:
    """Seconds until the last token, with a scheduler of its own or one that is idle."""
    line: Client | Scheduler = scheduler or line_for(engine)
    start, waiting = time.perf_counter(), list(reversed(texts))
    while waiting or not line.idle:
        while waiting and line.wants_more:
            line.add(waiting.pop())
        line.turn()
    jax.block_until_ready([each.pages for each in (engine, *engine.others)])
    taken = time.perf_counter() - start
    if scheduler is None:
        line.close()
    return taken


def ideal(engine: Engine, prompt_tokens: int, answer_tokens: int) -> tuple[float, float, float]:
    """Tokens a second of prompts alone and of 64 rows alone, and what the requests would take."""
    rng, vocab, slots = np.random.default_rng(), engine.config.vocab_size, engine.shapes.slots
    long = [Text(rng.integers(0, vocab, 2049).tolist(), 1) for _ in range(32)]
    prompts = 32 * 2048 / run(engine, long)
    short = [Text(rng.integers(0, vocab, 1).tolist(), 400) for _ in range(slots)]
    answers = slots * 400 / run(engine, short)
    return prompts, answers, prompt_tokens / prompts + answer_tokens / answers


def few_shot(engine: Engine) -> dict[str, float]:
    """Seconds behind one beginning, and without what they share."""
    rng, vocab = np.random.default_rng(), engine.config.vocab_size
    beginning = rng.integers(0, vocab, 2000).tolist()

    def texts(shared: bool) -> list[Text]:
        found = []
        for number in range(1000):
            own = [] if shared else [number]
            question = rng.integers(0, vocab, 30).tolist()
            found.append(Text([*own, *beginning, *question], 8))
        return found

    shared, apart = texts(True), texts(False)
    seconds = {"shared": run(engine, shared), "apart": run(engine, apart)}
    computed = sum(text.entering - text.shared_tokens for text in shared)
    print(
        f"few-shot: {seconds['shared']:.2f} s shared ({computed} prompt tokens computed), "
        f"{seconds['apart']:.2f} s apart",
        flush=True,
    )
    return seconds


def varied(engine: Engine, count: int = 2000) -> list[list[float]]:
    """Memory in use and programs compiled, before and after each half."""
    rng, vocab = np.random.default_rng(), engine.config.vocab_size

    def text() -> Text:
        asked: dict[str, Any] = {
            "temperature": float(rng.uniform(0.1, 2)),
            "top_k": int(rng.integers(1, 200)),
            "top_p": float(rng.uniform(0.1, 1)),
            "min_p": float(rng.uniform(0, 0.5)),
            "repetition_penalty": float(rng.uniform(0.9, 1.3)),
            "frequency_penalty": float(rng.uniform(-0.5, 0.5)),
            "logit_bias": {int(token): 1.0 for token in rng.integers(0, vocab, 3)},
        }
        chosen = {name: value for name, value in asked.items() if rng.random() < 0.3}
        top = int(rng.integers(0, 21)) if rng.random() < 0.2 else None
        tokens = rng.integers(0, vocab, int(rng.integers(1, 900))).tolist()
        return Text(tokens, int(rng.integers(1, 60)), Sampling(**chosen), top)

    def state() -> list[float]:
        stats = jax.devices()[0].memory_stats() or {}
        programs = sum(program._cache_size() for program in PROGRAMS.values())
        return [stats.get("bytes_in_use", 0) / 1e9, host_memory() / 1e9, programs]

    states = [state()]
    for _ in range(4):
        # In batches of every size, as they come from different callers.
        left = [text() for _ in range(count // 4)]
        while left:
            size = int(rng.integers(1, 100))
            run(engine, left[:size])
            del left[:size]
        states.append(state())
    print(f"varied: device GB, host GB, programs after each quarter: {states}", flush=True)
    return states


def host_memory() -> int:
    """Bytes of this process that are in memory and no file's."""
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["0.5b"])
    parser.add_argument("--few_shot", action="store_true")
    parser.add_argument("--varied", action="store_true")
    parser.add_argument("--count", type=int, default=384)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--orders", type=int, default=2)
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    for size in args.sizes:
        config = SIZES[size]
        drawn = random_parameters(config, DTYPE, time.time_ns() % 2**31)
        engine = Engine(config, prepare(config, drawn, DTYPE, "auto"), slots=args.slots)
        began = time.perf_counter()
        engine.compile()
        compiling = time.perf_counter() - began
        vocab, sizes, rng = config.vocab_size, lengths(args.count), np.random.default_rng()
        prompt, answer = map(sum, zip(*sizes, strict=True))
        orders = [sizes, sizes, *(rng.permutation(sizes).tolist() for _ in range(args.orders))]
        taken = [run(engine, requests(order, vocab)) for order in orders]
        own = [run(engine, requests(sizes, vocab, QWEN)) for _ in range(2)][-1]
        rates = [ideal(engine, prompt, answer) for _ in range(2)][-1]
        programs = {name: PROGRAMS[name]._cache_size() for name in PROGRAMS}
        others = ", ".join(f"{seconds:.2f}" for seconds in taken[2:])
        print(
            f"{size}: compilation {compiling:.1f} s; {prompt} + {answer} tokens; first "
            f"{taken[0]:.2f} s, again {taken[1]:.2f}, other orders {others}, with Qwen's own "
            f"settings {own:.2f}; ideal {rates[2]:.2f} ({rates[0]:,.0f} prompt tokens/s, "
            f"{rates[1]:,.0f} of {args.slots} rows); programs {programs}",
            flush=True,
        )
        figures[size] = {
            "compilation": compiling,
            "seconds": taken,
            "qwen": own,
            "ideal": rates,
            "programs": programs,
        }
        if args.few_shot:
            figures[size]["few_shot"] = few_shot(engine)
        if args.varied:
            figures[size]["varied"] = varied(engine)
        del engine
    record = {"benchmark": "gpu_requests", **vars(args), "figures": figures}
    versions = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps(record | versions))


if __name__ == "__main__":
    main()
