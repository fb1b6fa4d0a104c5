"""Choosing tokens: `sample_tokens` against plain XLA, which sorts where rows filter.

    python -m benchmarks.gpu_sampling

Calls are chained on the device, each waiting for the last one's tokens, and go round among sets of
logits that together are larger than the L2 cache; counting the chosen tokens is part of a call
where rows have penalties, and of every call of `sample_tokens`, which is one program for a number
of rows. Two minutes, most of it compilation. Prints one table, microseconds a call, then one JSON
line.
"""

import argparse
import json
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.sample_tokens import (
    Choice,
    Counts,
    Logprobs,
    count,
    pack,
    sample_tokens,
    settings,
    words,
)

VOCAB, VALID = 151_936, 151_665
LARGER_THAN_L2 = 150e6
MOST_SETS = 8
MOST_CALLS = 192
"""In a chain, for one row; fewer for many."""
ROUNDS = 5

# name -> what rows ask, in the words of `Sampling`, and how many log-probabilities
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "greedy": ({}, -1),
    "temperature": ({"temperature": 1.0}, -1),
    "top-k 20": ({"temperature": 1.0, "top_k": 20}, -1),
    "top-p 0.8": ({"temperature": 1.0, "top_p": 0.8}, -1),
    "Qwen's own": (
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        -1,
    ),
    "log-probabilities of 5": ({}, 5),
}

Call = Callable[..., tuple[Choice, Any]]
"""(params, logits, step, counts) -> (choice, counts)."""


def peaked(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Like a model's: a handful of tokens far above the rest."""
    logits = rng.standard_normal((rows, VOCAB), np.float32) * 3
    for row in logits:
        row[rng.choice(VOCAB, 8, replace=False)] += rng.uniform(8, 16, 8)
    return logits


def flat(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.standard_normal((rows, VOCAB), np.float32)


def sorting(rows: int, asked: dict[str, Any], logprobs: int, counts: Counts) -> tuple[Call, Any]:
    """What rows ask in plain XLA, which sorts wherever there is a top-k or a top-p."""
    penalty, heat = asked.get("repetition_penalty"), asked.get("temperature", 0)
    top_k, top_p = asked.get("top_k", 0), asked.get("top_p", 1)
    bits = np.unpackbits(np.asarray(counts.seen).view(np.uint8), axis=1, bitorder="little")
    seen = jnp.asarray(bits[:, :VOCAB] != 0) if penalty else None
    keys = jax.vmap(jax.random.key)(jnp.arange(rows))

    def keep(hot: jax.Array) -> jax.Array:
        descending = -jnp.sort(-hot, axis=-1)
        if top_k:
            descending = descending.at[:, top_k:].set(-jnp.inf)
        probabilities = jax.nn.softmax(descending, axis=-1)
        stays = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        least = jnp.where(stays, descending, jnp.inf).min(axis=-1, keepdims=True)
        return jnp.where(hot < least, -jnp.inf, hot)

    def call(keys: Any, logits: Any, step: Any, seen: Any) -> tuple[Any, Any]:
        logits = scores = jnp.where(jnp.arange(VOCAB) < VALID, logits, -jnp.inf)
        if penalty:
            lowered = jnp.where(logits > 0, logits / penalty, logits * penalty)
            scores = jnp.where(seen, lowered, logits)
        token = jnp.argmax(scores, axis=-1)
        if heat:
            hot = scores / heat
            hot = keep(hot) if top_k or top_p < 1 else hot
            token = jax.vmap(jax.random.categorical)(jax.vmap(jax.random.fold_in)(keys, step), hot)
        if penalty:
            seen = seen.at[jnp.arange(rows), token].set(True)
        likeliest = None
        if logprobs >= 0:
            own = jax.nn.log_softmax(logits, axis=-1)
            top, ids = lax.top_k(own, logprobs)
            chosen = jnp.take_along_axis(own, token[:, None], axis=-1)[:, 0]
            likeliest = Logprobs(chosen, ids, top)
        finite = jnp.isfinite(logits.max(axis=1))
        return Choice(token.astype(jnp.int32), ~finite, finite, likeliest), seen

    return call, (keys, seen)


def ours(
    rows: int, asked: dict[str, Any], logprobs: int, counts: Counts, implementation: str
) -> tuple[Call, Any]:
    names = {"repetition_penalty": "repetition"}
    columns = {names.get(name, name): value for name, value in asked.items()}
    params = settings(rows, seed=np.arange(rows), logprobs=logprobs, **columns)
    allowed = np.full((rows, words(VOCAB)), 2**32 - 1, np.uint32)

    def call(params: Any, logits: Any, step: Any, counts: Any) -> tuple[Any, Any]:
        params, allowed, bias = params
        choice = sample_tokens(
            logits, params, step, valid_tokens=VALID, bias=bias, counts=counts, allowed=allowed,
            implementation=implementation,
        )  # fmt: skip
        live = jnp.ones(rows, bool)
        return choice, count(counts, jnp.maximum(choice.token, 0), live)

    bias = jnp.zeros((rows, VOCAB), jnp.float32)
    return call, ((params, allowed, bias), counts)


def calls(sets: list[jax.Array]) -> int:
    """In a chain over these logits."""
    wanted = max(16, min(MOST_CALLS, 6144 // len(sets[0])))
    return max(1, wanted // len(sets)) * len(sets)


def chained(call: Call, arguments: Any, sets: list[jax.Array]) -> Callable[..., Any]:
    """Compiled, with calls that wait for each other."""
    turns = calls(sets) // len(sets)

    def chain(params: Any, tokens: Any, sets: list[jax.Array]) -> Any:
        def turn(_: Any, state: Any) -> Any:
            for logits in sets:
                step, tokens = state
                choice, tokens = call(params, logits, step, tokens)
                after = (step + choice.token + choice.finite) & 0xFFFF
                if choice.logprobs is not None:
                    after += jnp.isnan(choice.logprobs.chosen) + choice.logprobs.top_ids[:, 0] * 0
                state = lax.optimization_barrier((after.astype(jnp.int32), tokens))
            return state

        start = jnp.zeros(sets[0].shape[0], jnp.int32), tokens
        return lax.fori_loop(0, turns, turn, start)

    return jax.jit(chain).lower(*arguments, sets).compile()


@jax.jit
def _busy(x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 100, lambda _, y: (y @ x) * 1e-4, x)


def microseconds(run: Callable[..., Any], *args: Any) -> float:
    """Of a call; the GPU is kept busy before, for its clock falls while programs compile."""
    jax.block_until_ready(run(*args))
    jax.block_until_ready(_busy(jnp.ones((8192, 8192), jnp.bfloat16)))
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        taken.append((time.perf_counter() - start) / calls(args[-1]) * 1e6)
    return median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--implementation", default="auto", help="of sample_tokens")
    parser.add_argument("--old", default=True, action=argparse.BooleanOptionalAction)
    args = parser.parse_args()
    seed = secrets.randbits(31)
    table = []
    print("| rows | logits | asked | sorting us | sample_tokens us | |\n" + "| --- " * 6 + "|")
    for rows in args.rows:
        rng = np.random.default_rng([seed, rows])
        few = min(MOST_SETS, 1 + int(LARGER_THAN_L2 / (4 * rows * VOCAB)))
        texts = [rng.integers(0, VALID, 500) for _ in range(rows)]
        generated = np.zeros((rows, VOCAB), np.int32)
        counts = Counts(jnp.asarray(pack(texts, VOCAB)), jnp.asarray(generated))
        sets = {
            make.__name__: [jnp.asarray(make(rng, rows)) for _ in range(few)]
            for make in (peaked, flat)
        }
        any_set = sets["peaked"]
        new = {
            name: ours(rows, *asked, counts, args.implementation) for name, asked in CASES.items()
        }
        old = {name: sorting(rows, *asked, counts) for name, asked in CASES.items() if args.old}
        one = chained(*new["greedy"], any_set)  # one program for all
        with ThreadPoolExecutor() as pool:
            made = pool.map(chained, *zip(*old.values(), strict=True), [any_set] * len(old))
            compiled = dict(zip(old, made, strict=True))
        for kind, logits in sets.items():
            for name, (_, arguments) in new.items():
                ours_us = microseconds(one, *jax.device_put(arguments), logits)
                theirs = None
                if name in compiled:
                    theirs = microseconds(compiled[name], *old[name][1], logits)
                gain = f"{theirs / ours_us:.1f}x" if theirs else ""
                shown = f"{theirs:.1f}" if theirs else "-"
                print(
                    f"| {rows} | {kind} | {name} | {shown} | {ours_us:.1f} | {gain} |", flush=True
                )
                table.append([rows, kind, name, theirs and round(theirs, 1), round(ours_us, 1)])
    record = {
        "benchmark": "gpu_sampling",
        "columns": ["rows", "logits", "asked", "sorting_us", "sample_tokens_us"],
        "rows": table,
        "seed": seed,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print("\n" + json.dumps(record))


if __name__ == "__main__":
    main()
