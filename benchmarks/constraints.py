"""What it costs to hold answers to a form: the same texts free, and held, in turns.

    python -m benchmarks.constraints                         # the bundled model, 8 rows
    python -m benchmarks.constraints --size 0.5b --rows 64   # random weights, 151,936 tokens
    python -m benchmarks.constraints --alone --vocabulary my.gguf --rows 64   # without a model

Every row samples at temperature 1, and none ends: by turns its tokens are

- free: as they come, in calls of several steps;
- in halves: any, by a mask that costs nothing, in steps whose two halves are calls of their own;
- masked, a line for each form and one where rows have different ones: masks are found beside the
  first half. With jumps: the same, and tokens that are known enter at once.

All is of steps in between, when every row runs. Masks cost what masked steps take longer than those
in halves, told by the clock and, which other processes on a CPU disturb less, by the time of all
threads. They are found while a device is at the first half; what finding them takes by itself is
told, too, and how long the host waits for tokens: where it doesn't, a device waits for it.
`--alone` tells what one mask takes, taking the token before it included. `--shared` lets all
answers of a form use one automaton. Ends with one line of JSON.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import jax
import numpy as np

from benchmarks import random_model
from qwen_jax import Constraint, Sampling, api
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.replicas import line_for
from qwen_jax.engine.texts import Constraint as Held
from qwen_jax.engine.texts import Text
from qwen_jax.text import matching
from qwen_jax.text.matching import Matcher
from qwen_jax.text.tokenizer import Tokenizer
from qwen_jax.weights.gguf_file import open_gguf

SETTLED = 8
"""Tokens of each row before the clock starts."""

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
MIXED = list(FORMS.values())


class Anything:
    """Allows all but an end, at no cost."""

    forced = ()

    def __init__(self, stop_ids: Sequence[int]):
        self.stop_ids = stop_ids
        self.form = self

    @staticmethod
    def fill(constraints: Sequence[Any], masks: np.ndarray) -> list[str | None]:
        masks[:] = 2**32 - 1
        for token in next(held.stop_ids for held in constraints if held is not None):
            masks[:, token // 32] &= ~np.uint32(1 << token % 32)
        return [None] * len(constraints)

    @staticmethod
    def take(constraints: Sequence[Any], tokens: Sequence[Sequence[int]]) -> None:
        """It makes no difference."""

    def follow(self, tokens: Sequence[int]) -> int:
        return next((i for i, token in enumerate(tokens) if token in self.stop_ids), len(tokens))


class Timed(Matcher):
    """Notes how long masks take.

    Attributes:
        seconds: of each call.
    """

    seconds: ClassVar[list[float]] = []

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


class Measured(NamedTuple):
    """Steps of one kind, in seconds each: by the clock, of all threads, waiting for tokens, and
    finding masks."""

    step: float
    threads: float
    waits: float
    masks: float


def measured(engine: Engine, texts: Sequence[Text], tokens: int) -> Measured:
    """Of so many steps, from when all texts have some tokens, or until one has ended."""
    line, waits, real = line_for(engine), list[float](), jax.device_get
    begun: tuple[float, float, float] | None = None

    def device_get(given: Any) -> Any:
        start = time.perf_counter()
        got = real(given)
        waits.append(time.perf_counter() - start)
        return got

    for text in texts:
        line.add(text)
    with mock.patch.object(jax, "device_get", device_get):
        while True:
            line.turn()
            ended = any(text.over for text in texts)
            assert begun or not ended, "a text has ended before all run"
            least, given = min(text.given for text in texts), sum(text.given for text in texts)
            now = time.perf_counter(), time.process_time(), given / len(texts)
            if begun is None and least >= SETTLED:
                begun = now
                Timed.seconds, waits[:] = [], []
            elif begun is not None and (ended or least >= SETTLED + tokens):
                break
    line.close()
    clock, busy, steps = (b - a for a, b in zip(begun, now, strict=True))
    each = clock, busy, sum(waits), sum(Timed.seconds)
    return Measured(*(seconds / steps for seconds in each))


def alone(tokenizer: Tokenizer, rows: int, steps: int) -> dict[str, dict[str, float]]:
    """What a mask takes by the clock and of all threads, in µs, of each form and of all."""
    rng, stops, found = np.random.default_rng(0), list(tokenizer.stop_ids), {}
    masks = np.zeros((rows, -(-tokenizer.vocab_size // 32)), np.uint32)
    for name, forms in {**{name: [form] for name, form in FORMS.items()}, "mixed": MIXED}.items():
        held = [Matcher(forms[row % len(forms)], tokenizer) for row in range(rows)]
        clock, threads, tokens = list[float](), list[float](), list[list[int]]()
        for _ in range(steps):
            begun = time.perf_counter(), time.process_time()
            if tokens:
                Matcher.take(held, tokens)
            Matcher.fill(held, masks)
            clock.append(time.perf_counter() - begun[0])
            threads.append(time.process_time() - begun[1])
            bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
            bits[:, stops] = 0
            tokens = [[int(rng.choice(np.flatnonzero(row)))] for row in bits]
        each = {"clock_us": median(clock[1:]), "threads_us": float(np.mean(threads[1:]))}
        found[name] = {what: round(1e6 * value / rows, 1) for what, value in each.items()}
    return found


def held_to(
    forms: Sequence[Constraint], kind: type[Timed], tokenizer: Tokenizer
) -> Callable[[int], Held]:
    """Makes a row's constraint."""
    return lambda row: kind(forms[row % len(forms)], tokenizer)


def beside(
    engine: Engine, tokenizer: Tokenizer, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Figures of each kind of steps."""
    rng, vocab = np.random.default_rng(), engine.config.vocab_size
    no_end = dict.fromkeys(tokenizer.stop_ids, -np.inf)
    # Texts enter a few a turn, and those with jumps are the faster ones.
    limit = 2 * (SETTLED + args.tokens + engine.shapes.steps * (args.rows + 4))
    limit = min(limit, engine.config.context_length - 20)
    kinds: dict[str, Callable[[int], Held | None]] = {
        "free": lambda row: None,
        "in halves": lambda row: Anything(tokenizer.stop_ids),
    }
    for name in args.forms:
        forms = MIXED if name == "mixed" else [FORMS[name]]
        kinds[name] = held_to(forms, Step, tokenizer)
        kinds[f"{name}, with jumps"] = held_to(forms, Timed, tokenizer)
    turns: dict[str, list[Measured]] = {name: [] for name in kinds}
    for turn in range(args.rounds + 1):
        for name, held in kinds.items():
            texts = [
                Text(
                    rng.integers(0, vocab, 20).tolist(),
                    limit,
                    Sampling(
                        temperature=1.0,
                        seed=int(rng.integers(2**32)),
                        logit_bias=no_end if name == "free" else {},
                    ),
                    constraint=held(row),
                )
                for row in range(args.rows)
            ]
            found = measured(engine, texts, args.tokens)
            if turn:  # the first may compile
                turns[name].append(found)
    figures: dict[str, dict[str, Any]] = {}
    for name, each in turns.items():
        figures[name] = {
            f"{what}_us": round(1e6 * median(getattr(one, what) for one in each))
            for what in Measured._fields
        }
        pairs = list(zip(each, turns["in halves"], strict=True))
        for what in ("step", "threads"):
            ratio = median(getattr(a, what) / getattr(b, what) for a, b in pairs)
            figures[name][f"{what}_cost"] = round(100 * (ratio - 1), 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=random_model.SIZES, help="random weights; else bundled")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    every = [*FORMS, "mixed"]
    parser.add_argument("--forms", choices=every, nargs="+", default=["mixed"])
    parser.add_argument("--threads", type=int, help="that find masks")
    parser.add_argument("--shared", action="store_true", help="one automaton a form")
    parser.add_argument("--vocabulary", help="a GGUF file whose tokens answers are made of")
    parser.add_argument("--alone", action="store_true", help="masks alone, without a model")
    args = parser.parse_args()
    if args.threads:
        matching.THREADS = matching.AUTOMATA = args.threads
    if args.shared:
        matching.AUTOMATA = 1
    tokenizer = None
    if args.vocabulary:
        tokenizer = Tokenizer.from_gguf(open_gguf(args.vocabulary).metadata, args.vocabulary)
    if args.alone:
        tokenizer = tokenizer or api.load().tokenizer
        figures: dict[str, Any] = alone(tokenizer, args.rows, args.tokens)
    else:
        with tempfile.TemporaryDirectory() as folder:
            if args.size:
                path = Path(folder) / "random.gguf"
                random_model.write(path, random_model.SIZES[args.size], 0, "F16")
                model = api.load(path, slots=args.rows)
            else:
                model = api.load(slots=args.rows)
        engine = model.engine  # which is to let no text go: `benchmarks.unmasked`
        shapes = dataclasses.replace(engine.shapes, unmasked=False)
        engine.layout = engine.layout._replace(shapes=shapes)
        engine.compile(constrained=True)
        figures = beside(engine, tokenizer or model.tokenizer, args)
    width = max(map(len, figures)) + 2
    print(" " * width + "".join(f"{name:>14}" for name in next(iter(figures.values()))))
    for name, found in figures.items():
        print(f"{name:<{width}}" + "".join(f"{value:>14,}" for value in found.values()))
    record = {"benchmark": "constraints", **vars(args), "figures": figures}
    versions = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps(record | versions))


if __name__ == "__main__":
    main()
