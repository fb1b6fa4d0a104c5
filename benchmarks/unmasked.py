"""Answers of a form that a model keeps to by itself, held by masks all the time and as they are.

    python -m benchmarks.unmasked --size 0.5b --rows 1 64    # random weights, on a GPU
    python -m benchmarks.unmasked --rows 8                   # the bundled model

Random weights keep to no form. So what is chosen is replaced, after it has been chosen, by what
stands next in a text of the form (`benchmarks.gpu_speculation.told`); `--astray N` lets every N-th
token of each text be another one, unless a mask is there. By turns, rows are `free`, `held` by
masks at every token, and `let go` as the engine does it; the time is that of a token of each row
once all run. Ends with one line of JSON.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from benchmarks import random_model
from benchmarks.constraints import FORMS, SETTLED, Measured, measured
from benchmarks.gpu_speculation import ANSWER, told
from qwen_jax import Sampling, api
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.texts import Text
from qwen_jax.executables.kept import keep_in
from qwen_jax.text.matching import Matcher
from qwen_jax.text.tokenizer import Tokenizer

KINDS = ("free", "held", "let go")


def words(rng: np.random.Generator, count: int) -> str:
    letters = [chr(97 + n) for n in rng.integers(0, 26, 400)]
    sizes = rng.integers(2, 9, count)
    return " ".join("".join(rng.choice(letters, size)) for size in sizes)


def place(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "name": words(rng, 3).title(),
        "kind": str(rng.choice(["café", "museum", "park", "station", "theatre"])),
        "rating": int(rng.integers(1, 6)),
        "open": bool(rng.integers(2)),
        "since": f"{rng.integers(1900, 2020)}-{rng.integers(1, 13):02}-{rng.integers(1, 29):02}",
    }


class Own(Matcher):
    """Lets answers spell what is known as they do, and takes a step for each token."""

    @property
    def forced(self) -> list[int]:
        return []

    @forced.setter
    def forced(self, tokens: list[int]) -> None: ...


WRITTEN: dict[str, Callable[[np.random.Generator], str]] = {
    "places": lambda rng: json.dumps([place(rng) for _ in range(200)], ensure_ascii=False),
    "strings": lambda rng: json.dumps([words(rng, 5) for _ in range(400)]),
    "words": lambda rng: "".join(f"{words(rng, 6).capitalize()}. " for _ in range(400)),
    "lines": lambda rng: "".join(f"{words(rng, 6)[:60]:.<20}\n" for _ in range(400)),
}
"""Of each form a text that fits it, longer than what is made."""


def figures_of(
    engines: dict[str, Engine], tokenizer: Tokenizer, form: str, rows: int, args: argparse.Namespace
) -> dict[str, Any]:
    rng = np.random.default_rng()
    written = [tokenizer.encode(WRITTEN[form](rng))[:ANSWER] for _ in range(rows)]
    assert all(len(answer) == ANSWER for answer in written)
    turns: dict[str, list[Measured]] = {kind: [] for kind in KINDS}
    returns = list[int]()
    (never,) = tokenizer.encode("<|im_start|>")
    with told(written, (args.astray, never) if args.astray else None):
        for turn in range(args.rounds + 1):
            for kind in KINDS:
                texts = [
                    Text(
                        rng.integers(0, tokenizer.vocab_size, 20).tolist(),
                        ANSWER,
                        Sampling(temperature=1.0, seed=row),
                        constraint=None if kind == "free" else Own(FORMS[form], tokenizer),
                    )
                    for row in range(rows)
                ]
                found = measured(engines[kind], texts, args.tokens)
                if turn:  # the first compiles
                    turns[kind].append(found)
                if kind == "let go":
                    returns.append(sum(text.trust.returns for text in texts if text.trust))
    each = {kind: round(1e6 * median(one.step for one in turns[kind])) for kind in KINDS}
    costs = {
        kind: round(
            median(a.step / b.step for a, b in zip(turns[kind], turns["free"], strict=True)), 3
        )
        for kind in KINDS[1:]
    }
    return {"us": each, "of_free": costs, "returns_a_text": round(median(returns) / rows, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=random_model.SIZES, help="random weights; else bundled")
    parser.add_argument("--rows", type=int, nargs="+", default=[8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--astray", type=int, default=0)
    parser.add_argument("--forms", choices=WRITTEN, nargs="+", default=[*WRITTEN])
    args = parser.parse_args()
    assert SETTLED + args.tokens < ANSWER - 100, f"at most {ANSWER - 100 - SETTLED} tokens"
    figures: dict[str, Any] = {}
    print(
        "form, rows          "
        + "".join(f"{kind:>10}" for kind in KINDS)
        + "  of free: held, let go"
    )
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.gguf"
            if args.size:
                seed = time.time_ns() % 2**31
                random_model.write(path, random_model.SIZES[args.size], seed, "F16")
            model = api.load(path if args.size else api.BUNDLED, slots=rows)
        keep_in(None)  # What is patched is no program to be kept.
        config, weights = model.engine.config, model.engine.weights
        stops = tuple(model.engine.spec.stop_ids)
        engines = {kind: Engine(config, weights, slots=rows, stop_ids=stops) for kind in KINDS[1:]}
        for kind, engine in engines.items():
            shapes = dataclasses.replace(engine.shapes, unmasked=kind == "let go")
            engine.layout = engine.layout._replace(shapes=shapes)
        for form in args.forms:
            found = figures_of(
                engines | {"free": engines["held"]}, model.tokenizer, form, rows, args
            )
            figures[f"{form}, {rows}"] = found
            us, of_free = found["us"], found["of_free"]
            print(
                f"{form + ', ' + str(rows):<20}"
                + "".join(f"{us[kind]:>10,}" for kind in KINDS)
                + f"  {of_free['held']:.2f}, {of_free['let go']:.2f}",
                flush=True,
            )
    record = {"benchmark": "unmasked", **vars(args), "figures": figures}
    print(json.dumps(record | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}))


if __name__ == "__main__":
    main()
