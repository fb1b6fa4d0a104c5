"""Engines over tiny random models, and plain loops that drive one: by a scheduler, or by force."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sample_tokens import settings
from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.rows import Rows, pack_rows
from qwen_jax.engine.sampling import Plan, Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.shapes import pieces_of
from qwen_jax.engine.steps import Extras, State
from qwen_jax.engine.texts import News, Text
from qwen_jax.model.cache import PAGE, pages_for
from tests.golden_cases import Case
from tests.tiny_checkpoints import canonical


def device_parameters(params: Mapping[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    """Hugging Face parameters as the engine takes them: fused, norms float32, the rest `dtype`."""
    return {
        name: jnp.asarray(value, "float32" if name.endswith("norm") else dtype)
        for name, value in canonical(params).items()
    }


@functools.cache
def random_parameters(config: ModelConfig, seed: int, dtype: str) -> dict[str, jax.Array]:
    """A golden case's parameters."""
    return device_parameters(Case(config, seed).parameters(), dtype)


def fresh_engine(
    config: ModelConfig, seed: int = 0, dtype: str = "float32", **options: Any
) -> Engine:
    """An engine over a golden case's parameters with an empty cache; equal ones share programs."""
    return Engine(config, random_parameters(config, seed, dtype), **options)


random_engine = functools.cache(fresh_engine)
"""The same, made once, with whatever tests before have left in its cache."""


def reshape(engine: Engine, **changes: Any) -> None:
    """Gives an engine that has run nothing yet other sizes of calls."""
    shapes = dataclasses.replace(engine.shapes, **changes)
    engine.layout = engine.layout._replace(shapes=shapes)


def random_tokens(config: ModelConfig, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """||ours - reference|| / ||reference||, in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


class Prompt(NamedTuple):
    """A prompt's ids and the most tokens it may be answered with."""

    tokens: Sequence[int]
    max_tokens: int


class Generated(NamedTuple):
    """What every text chose, in order."""

    tokens: list[list[int]]
    logprobs: list[list[float]]


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling] | None = None,
    *,
    logprobs: bool = False,
) -> Generated:
    """Adds all texts at once, and drives a scheduler until every one has ended."""
    texts = [
        Text(prompt.tokens, engine.room(*prompt), sampling, 0 if logprobs else None)
        for prompt, sampling in zip(prompts, samplings or [Sampling()] * len(prompts), strict=True)
    ]
    told = run_to_end(engine, [text for text in texts if text.limit > 0])
    found = {
        text: [entry for news in told if news.text is text for entry in (news.logprobs or [])]
        for text in texts
    }
    return Generated(
        [[token for news in told if news.text is text for token in news.tokens] for text in texts],
        [[chosen for chosen, _ in found[text]] for text in texts] if logprobs else [],
    )


def run_to_end(engine: Engine, texts: Iterable[Text]) -> list[News]:
    """All news of some texts, through a scheduler of their own."""
    scheduler, told = Scheduler(engine), []
    for text in texts:
        scheduler.add(text)
    while not scheduler.idle:
        told += scheduler.turn()
    return told


def fill(engine: Engine, texts: Sequence[Sequence[int]], room: int = 1) -> np.ndarray:
    """Puts texts into the cache, each into pages of its own with room for more tokens; returns
    their tables `[B, n]`."""
    tables = np.zeros((len(texts), engine.layout.table_width), np.int32)
    for table, text in zip(tables, texts, strict=True):
        held = engine.pool.take(pages_for(len(text) + room))
        table[: len(held)] = held
        for start, length, padded in pieces_of(0, len(text), engine.shapes):
            part = np.zeros((1, padded), np.int32)
            part[0, :length] = text[start : start + length]
            at, end = np.array([start], np.int32), np.array([start + length], np.int32)
            engine.pages = steps.extend(
                engine.spec, engine.weights, engine.pages, table[None], part, at, end
            )
    return tables


def poison(engine: Engine, tables: np.ndarray, lengths: Sequence[int], value: float) -> None:
    """Fills the cache with `value`, but for so many positions of each row."""
    kept = np.zeros((1 + engine.pool.size, PAGE), bool)
    for table, length in zip(tables, lengths, strict=True):
        for j in range(pages_for(length)):
            kept[table[j], : length - j * PAGE] = True
    pages = np.array(engine.pages)
    engine.pages = jnp.asarray(
        np.where(kept[None, :, None, :, None], pages, pages.dtype.type(value))
    )


def rows_of(tokens: Sequence[int], positions: Sequence[int], **columns: Any) -> Rows:
    """Rows that go on with a token at a position: all live and fresh, nothing generated, one token
    to come, greedy, but for the columns given."""
    rows = len(tokens)
    whole = {
        "slot": np.arange(rows),
        "live": np.ones(rows),
        "fresh": np.ones(rows),
        "token": tokens,
        "generated": np.zeros(rows),
        "start": positions,
        "limit": np.ones(rows),
        "settings": settings(rows),
    } | columns
    asked = whole.pop("settings")
    return Rows(settings=asked, **{k: np.asarray(v, np.int32) for k, v in whole.items()})


def run_steps(
    engine: Engine,
    tables: np.ndarray,
    state: State,
    extras: Extras | None,
    rows: Rows,
    plan: Plan,
    count: int,
) -> tuple[State, Extras | None, steps.Emitted]:
    """A call of `step` on the engine's pages; all else is the caller's."""
    engine.pages, *rest = steps.step(
        engine.spec,
        engine.weights,
        engine.pages,
        tables,
        state,
        extras,
        pack_rows(rows),
        plan,
        count,
    )
    state, extras, emitted = rest
    return state, extras, emitted


@functools.cache
def _blank(rows: int, vocab: int) -> tuple[State, Extras]:
    """Of rows that are all fresh, and ask for no penalty."""
    state, extras = jax.device_get((State.create(rows), Extras.create(rows, vocab)))
    return state, extras


def forced(
    engine: Engine, tables: np.ndarray, tokens: Sequence[int], positions: Sequence[int]
) -> np.ndarray:
    """One decode step of each row with a token at a position: log-probabilities `[B, V]` of what
    follows. All of them come out as the top V."""
    rows, vocab = len(tokens), engine.config.vocab_size
    asked = rows_of(tokens, positions, settings=settings(rows, logprobs=vocab))
    plan = Plan(True, vocab)
    _, _, emitted = run_steps(engine, tables, *_blank(rows, vocab), asked, plan, 1)
    assert emitted.logprobs is not None
    _, ids, top = (np.asarray(x)[0] for x in emitted.logprobs)
    out = np.full((rows, 1 + vocab), -np.inf, np.float32)
    np.put_along_axis(out, np.where(ids < 0, vocab, ids), top, axis=1)
    return out[:, :vocab]


def decoded_logprobs(engine: Engine, tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities after every position, `[T, V]`, all of them from decode steps."""
    tables = fill(engine, [[]], len(tokens))
    found = [forced(engine, tables, [token], [i]) for i, token in enumerate(tokens)]
    engine.pool.release([int(page) for page in tables[0, : pages_for(len(tokens))]])
    return np.concatenate(found)
