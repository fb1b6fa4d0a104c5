"""What it costs to hold answers to a form: the same texts free, and held, in turns.

    python -m benchmarks.constraints                         # the bundled model, 8 rows
    python -m benchmarks.constraints --size 0.5b --rows 64   # random weights, 151,936 tokens

Every row samples at temperature 1, and none ends: by turns its tokens are

- free: as they come, in calls of several steps;
- in halves: any, by a mask that costs nothing, in steps whose two halves are calls of their own;
- masked: held to one of some forms, whose masks are found beside the first half;
- with jumps: the same, and tokens that are known enter at once.

Masks cost what masked steps take longer than those in halves, told by the clock and, which other
processes on a CPU disturb less, by the time of all threads. They are found while a device is at the
first half; what finding them takes by itself is told, too. Ends with one line of JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from benchmarks import random_model
from benchmarks.gpu_requests import run
from qwen_jax import Constraint, Sampling, api
from qwen_jax.engine.texts import Constraint as Held
from qwen_jax.engine.texts import Text
from qwen_jax.text.matching import Matcher

PLACE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["café", "museum", "park", "station", "theatre"]},
        "rating": {"type": "integer", "minimum": 1, "maximum": 5},
        "open": {"type": "boolean"},
        "since": {"type": "string", "format": "date"},
    },
    "required": ["name", "kind", "rating", "open", "since"],
    "additionalProperties": False,
}


def endless(items: dict[str, Any]) -> Constraint:
    return Constraint.json_schema({"type": "array", "items": items, "minItems": 10_000})


FORMS = {
    "places": endless(PLACE),
    "strings": endless({"type": "string"}),
    "numbers": endless({"type": "number"}),
    "any JSON": endless({"type": "object"}),
    "words": Constraint.regex(r"([A-Z][a-z]{1,9}( [a-z]{1,9}){2,9}\. ){10000}"),
    "lines": Constraint.lark('start: (line "\\n"){10000}\nline: /[^\\n]{20,60}/'),
}


class Anything:
    """Allows all but an end, at no cost."""

    forced = ()

    def __init__(self, stop_ids: Sequence[int]):
        self.stop_ids = stop_ids

    @staticmethod
    def fill(constraints: Sequence[Any], masks: np.ndarray) -> list[str | None]:
        masks[:] = 2**32 - 1
        for token in next(held.stop_ids for held in constraints if held is not None):
            masks[:, token // 32] &= ~np.uint32(1 << token % 32)
        return [None] * len(constraints)

    @staticmethod
    def take(constraints: Sequence[Any], tokens: Sequence[Sequence[int]]) -> None:
        """It makes no difference."""


class Timed(Matcher):
    """Notes how long masks take.

    Attributes:
        seconds: of each call.
    """

    seconds: list[float]

    @staticmethod
    def fill(matchers: Sequence[Matcher | None], masks: np.ndarray) -> list[str | None]:
        start = time.perf_counter()
        found = Matcher.fill(matchers, masks)
        Timed.seconds.append(time.perf_counter() - start)
        return found


class Step(Timed):
    """Tells of no token but the next."""

    @property
    def forced(self) -> list[int]:
        return self._forced[:1]

    @forced.setter
    def forced(self, tokens: list[int]) -> None:
        self._forced = tokens

    @staticmethod
    def take(matchers: Sequence[Any], tokens: Sequence[Sequence[int]]) -> None:
        left = [m._forced[len(t) :] for m, t in zip(matchers, tokens, strict=True)]
        Matcher.take(matchers, tokens)
        for matcher, forced in zip(matchers, left, strict=True):
            matcher.forced = forced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=random_model.SIZES, help="random weights; else bundled")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--forms", choices=FORMS, nargs="+", default=list(FORMS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.size:
            path = Path(folder) / "random.gguf"
            random_model.write(path, random_model.SIZES[args.size], 0, "F16")
            model = api.load(path, slots=args.rows)
        else:
            model = api.load(slots=args.rows)
    engine, tokenizer = model.engine, model.tokenizer
    engine.compile(constrained=True)
    rng, vocab = np.random.default_rng(), tokenizer.vocab_size
    no_end = dict.fromkeys(tokenizer.stop_ids, -np.inf)
    forms = [FORMS[name] for name in args.forms]
    kinds: dict[str, Callable[[int], Held | None]] = {
        "free": lambda row: None,
        "in halves": lambda row: Anything(tokenizer.stop_ids),
        "masked": lambda row: Step(forms[row % len(forms)], tokenizer),
        "with jumps": lambda row: Timed(forms[row % len(forms)], tokenizer),
    }
    clock, threads, masks = ({name: list[float]() for name in kinds} for _ in range(3))
    for turn in range(args.rounds + 1):
        for name, held in kinds.items():
            Timed.seconds = []
            bias = no_end if name == "free" else {}
            texts = [
                Text(
                    rng.integers(0, vocab, 20).tolist(),
                    args.tokens,
                    Sampling(temperature=1.0, seed=int(rng.integers(2**32)), logit_bias=bias),
                    constraint=held(row),
                )
                for row in range(args.rows)
            ]
            begun = time.process_time()
            seconds = run(engine, texts)
            busy = time.process_time() - begun
            steps = sum(text.given for text in texts) / args.rows
            if turn:  # the first may compile
                clock[name].append(seconds / steps)
                threads[name].append(busy / steps)
                masks[name] += Timed.seconds
    figures = {
        name: {
            "step_us": round(1e6 * median(clock[name])),
            "least_us": round(1e6 * min(clock[name])),
            "threads_us": round(1e6 * median(threads[name])),
            "masks_us": round(1e6 * median(masks[name])) if masks[name] else 0,
        }
        for name in kinds
    }
    print(" " * 12 + "".join(f"{name:>12}" for name in figures["free"]))
    for name, found in figures.items():
        print(f"{name:<12}" + "".join(f"{value:>12,}" for value in found.values()))
    cost = {
        what: round(100 * median(m / h - 1 for m, h in zip(*each, strict=True)), 1)
        for what, each in {
            "clock": (clock["masked"], clock["in halves"]),
            "threads": (threads["masked"], threads["in halves"]),
        }.items()
    }
    print(f"masks cost {cost['clock']} % by the clock, {cost['threads']} % of all threads' time")
    record = {"benchmark": "constraints", **vars(args), "figures": figures, "masks_cost": cost}
    versions = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps(record | versions))


if __name__ == "__main__":
    main()
