"""Decoding with drafts beside plain decoding, through the scheduler, on texts whose end is known.

    python -m benchmarks.gpu_speculation --sizes 0.5b 7b --texts 1 8
    python -m benchmarks.gpu_speculation --sizes 7b --draft 0.5b --texts 1 8

Random weights copy nothing. So what is chosen is replaced, after it has been chosen, by what stands
next in a text of this repository, with drafts and without: every step computes all that it would,
and how often a draft is right is a matter of the text, as it would be of a model that writes it. A
token is what Qwen2's tokenizer splits texts into before it looks for pairs, about a word.

Three kinds of requests: `copy` gives back a part of its prompt, `edit` a module of its prompt in
which a name is changed wherever it stands, `prose` goes on with a page of documentation. The two
engines take turns; a figure is the median of the ratios of such pairs.

With --draft a smaller model drafts, and texts are what random weights choose, greedily: such a
draft is never right, so that only what it costs is measured.
Ends with one line of JSON.
"""

import argparse
import contextlib
import functools
import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from benchmarks.gpu_decode import DTYPE, random_parameters
from benchmarks.random_model import SIZES
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import Text
from qwen_jax.engine.weights import Weights, prepare
from qwen_jax.text.vocabulary import PATTERN

ROOT = Path(__file__).parent.parent
MODULES = ("lookup", "drafts", "pool", "shapes", "texts", "replicas", "spec", "layout")
PAGES = ("scheduler", "scaling", "constraints", "quantisation", "logprobs", "certificate")
PROMPT, ANSWER = 1200, 400
"""Tokens, at most."""
KINDS = ("copy", "edit", "prose")
GAIN, LOSS = 1.8, 0.97
"""What is wanted of the first two, and of the last."""


class Words:
    """Ids of what texts are split into, by first appearance."""

    def __init__(self) -> None:
        self._split = Split(Regex(PATTERN), "isolated")
        self._ids: dict[str, int] = {}

    def ids(self, text: str) -> list[int]:
        words = [word for word, _ in self._split.pre_tokenize_str(text)]
        return [self._ids.setdefault(word, len(self._ids)) for word in words]


def renamed(source: str) -> str:
    """A module in which the name that it has most often is another one."""
    names = re.findall(r"\b_?[a-z]+(?:_[a-z]+)*\b", source)
    usual = max((n for n in set(names) if len(n) > 5), key=names.count)
    return re.sub(rf"\b{usual}\b", f"{usual}_changed", source)


def requests(kind: str, count: int) -> list[tuple[list[int], list[int]]]:
    """Prompts, and what they are answered with."""
    words, found = Words(), []
    for number in range(count):
        module = (ROOT / f"qwen_jax/engine/{MODULES[number % len(MODULES)]}.py").read_text()
        page = (ROOT / "docs" / f"{PAGES[number % len(PAGES)]}.md").read_text()
        if kind == "edit":
            prompt, answer = words.ids(module)[:PROMPT], words.ids(renamed(module))
        elif kind == "copy":
            prompt = words.ids(page)[:PROMPT]
            answer = prompt[100:]
        else:
            every = words.ids(page)
            prompt, answer = every[: len(every) // 3], every[len(every) // 3 :]
        prompt += words.ids(f"\n\nNow the {kind}, please.\n")
        found.append((prompt, answer[:ANSWER]))
    return found


@contextlib.contextmanager
def told(answers: Sequence[Sequence[int]], astray: tuple[int, int] | None = None) -> Iterator[None]:
    """Programs that are traced meanwhile give these answers, by the seed of a text, whatever they
    have chosen; what they compute stays as it is.

    Args:
        astray: so many tokens from one to the next in whose place stands this one, unless there is
            a mask.
    """
    table = np.zeros((len(answers), ANSWER), np.int32)
    for row, answer in zip(table, answers, strict=True):
        row[: len(answer)] = answer
    real = steps.choice_of

    def choice_of(spec: Any, plan: Any, asked: Any, logits: Any, generated: Any, *rest: Any) -> Any:
        choice = real(spec, plan, asked, logits, generated, *rest)
        which = jnp.minimum(asked.seed.astype(jnp.int32), len(table) - 1)
        known = jnp.asarray(table)[which, jnp.clip(generated, 0, ANSWER - 1)]
        if astray is not None:
            every, other = astray
            there = (generated % every == every - 1) & (asked.masked == 0)
            known = jnp.where(there, other, known)
        # Nothing is chosen that is less than this, which XLA does not know.
        token = jnp.where(choice.token < -(1 << 30), choice.token, known)
        return choice._replace(token=token)

    jax.clear_caches()
    with mock.patch.object(steps, "choice_of", choice_of):
        yield
    jax.clear_caches()


def run(engine: Engine, texts: Sequence[Text]) -> tuple[float, dict[Text, list[int]]]:
    """Seconds from the first token of answers to the last, and the tokens."""
    scheduler = Scheduler(engine)
    found: dict[Text, list[int]] = {text: [] for text in texts}
    for text in texts:
        scheduler.add(text)
    start = 0.0
    while not scheduler.idle:
        news = scheduler.turn()
        if news and not start:
            start = time.perf_counter()
        for one in news:
            found[one.text] += one.tokens
    return time.perf_counter() - start, found


def compared(
    plain: Engine, drafting: Engine, made: Any, repeats: int, answers: Any = None
) -> dict[str, float]:
    """How many times as fast drafts are, and what they were."""
    ratios, rates, same = [], [], 0
    for repeat in range(-1, repeats):  # the first time compiles
        first = made()
        second = [Text(text.tokens, text.limit, text.sampling) for text in first]
        order = [(plain, first), (drafting, second)]
        taken = {}
        for engine, texts in order if repeat % 2 else reversed(order):
            taken[engine is drafting] = run(engine, texts)
        tokens = [list(found.values()) for _, found in (taken[False], taken[True])]
        assert answers is None or tokens[1] == answers, "an answer is not what it is to be"
        if repeat >= 0:
            ratios.append(taken[False][0] / taken[True][0])
            rates.append(sum(map(len, tokens[1])) / taken[True][0])
        same = sum(a == b for a, b in zip(*tokens, strict=True))
        records = [text.record for text in second]
    drafted, accepted = (sum(getattr(r, name) for r in records) for name in ("drafted", "accepted"))
    return {
        "ratio": median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "tokens_per_s": median(rates),
        "drafted": drafted,
        "accepted": accepted,
        "same": same,
        "texts": len(records),
    }


def engine_of(size: str, weights: Weights, tokens: int, **options: Any) -> Engine:
    return Engine(
        SIZES[size], weights, draft_tokens=tokens, slots=64, cache_tokens=100_000, **options
    )


def drawn(size: str) -> Weights:
    config = SIZES[size]
    return prepare(config, random_parameters(config, DTYPE, time.time_ns() % 2**31), DTYPE, "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=["0.5b"])
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--draft", choices=SIZES)
    parser.add_argument("--tokens", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch_invariant", action="store_true")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    invariant = {"batch_invariant": args.batch_invariant}
    print("| size | texts | kind | times as fast | from, to | tokens/s | accepted of drafted |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    known = {kind: requests(kind, max(args.texts)) for kind in KINDS}
    for size in args.sizes:
        weights = drawn(size)
        plain = engine_of(size, weights, 0, **invariant)
        drafting = engine_of(size, weights, args.tokens, **invariant)
        with contextlib.ExitStack() as stack:
            if args.draft is None:
                stack.enter_context(told([answer for kind in KINDS for _, answer in known[kind]]))
            else:
                drafting.drafts_with(engine_of(args.draft, drawn(args.draft), 0, **invariant))
            for count, kind in itertools.product(args.texts, KINDS if args.draft is None else [""]):
                answers, made = None, functools.partial(random_texts, size, count)
                if args.draft is None:
                    first = KINDS.index(kind) * max(args.texts)
                    asked = known[kind][:count]
                    answers = [answer for _, answer in asked]
                    made = functools.partial(known_texts, asked, first, args.temperature)
                found = compared(plain, drafting, made, args.repeats, answers)
                name = kind or "random"
                figures[f"{size} {count} {name}"] = found
                print(
                    f"| {size} | {count} | {name} | {found['ratio']:.2f} | {found['least']:.2f}, "
                    f"{found['most']:.2f} | {found['tokens_per_s']:,.0f} | {found['accepted']} of "
                    f"{found['drafted']} |",
                    flush=True,
                )
        del plain, drafting
    record = {"benchmark": "gpu_speculation", **vars(args), "figures": figures}
    versions = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    met = {
        key: found["ratio"] >= (GAIN if key.split()[-1] in ("copy", "edit") else LOSS)
        for key, found in figures.items()
    }
    print(json.dumps(record | versions | {"met": met}))


def known_texts(
    asked: Sequence[tuple[list[int], list[int]]], first: int, temperature: float
) -> list[Text]:
    """Their seeds say which they are of all."""
    return [
        Text(prompt, len(answer), Sampling(temperature, seed=number))
        for number, (prompt, answer) in enumerate(asked, first)
    ]


def random_texts(size: str, count: int) -> list[Text]:
    rng, vocab = np.random.default_rng(), SIZES[size].vocab_size
    return [Text(rng.integers(0, vocab, 500).tolist(), ANSWER) for _ in range(count)]


if __name__ == "__main__":
    main()
