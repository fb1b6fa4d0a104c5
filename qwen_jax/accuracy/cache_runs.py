"""Texts through an engine's own compiled functions, with a cache of our choosing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from qwen_jax.accuracy.cache_slots import Scenario
from qwen_jax.engine.engine import Emitted, Engine, Rows
from qwen_jax.engine.sampling import Sampling, plan_rows
from qwen_jax.model.cache import Cache
from qwen_jax.model.decoder import activation_dtype


@dataclasses.dataclass(frozen=True)
class Shown:
    """What an engine shows of one row.

    Attributes:
        logits: log-probabilities after each position, NaN where the engine shows none.
        keys, values: of each layer, what the slots of the text hold at the end.
    """

    logits: Float[np.ndarray, "T V"]
    keys: Float[np.ndarray, "L T K H"]
    values: Float[np.ndarray, "L T K H"]


def run(engine: Engine, scenario: Scenario, valid: int) -> list[Shown]:
    """Every row of a scenario; `valid` tokens are in use."""
    empty = _cache(engine, scenario)
    decoded = any(len(row.tokens) > row.prompt for row in scenario.rows)
    logits = [np.full((len(row.tokens), valid), np.nan) for row in scenario.rows]
    through = _decode if decoded else _prefill
    cache = through(engine, scenario, empty, logits)
    keys, values = (
        np.stack([np.asarray(x).astype(np.float64) for x in layers])
        for layers in (cache.k, cache.v)
    )
    return [
        Shown(
            logits[b],
            keys[:, b, :, : len(row.tokens)].swapaxes(1, 2),
            values[:, b, :, : len(row.tokens)].swapaxes(1, 2),
        )
        for b, row in enumerate(scenario.rows)
    ]


def _cache(engine: Engine, scenario: Scenario) -> Cache:
    cache = engine.create_cache(len(scenario.rows), scenario.capacity)
    if scenario.poisoned:
        cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
    step = scenario.chunks[0]
    for start in range(0, len(scenario.before), step):
        tokens = np.array([scenario.before[start : start + step]] * len(scenario.rows), np.int32)
        lengths = np.full(len(scenario.rows), len(scenario.before), np.int32)
        cache, _ = engine._logits(engine.weights, cache, tokens, np.int32(start), lengths)
    return cache


def _prompts(scenario: Scenario, start: int, length: int) -> np.ndarray:
    tokens = np.zeros((len(scenario.rows), length), np.int32)
    for b, row in enumerate(scenario.rows):
        part = row.tokens[start : min(start + length, row.prompt)]
        tokens[b, : len(part)] = part
    return tokens


def _prefill(engine: Engine, scenario: Scenario, cache: Cache, logits: list[np.ndarray]) -> Cache:
    """The logits of every position, from the calls that `Engine.logits` makes."""
    lengths = np.array([row.prompt for row in scenario.rows], np.int32)
    start = 0
    for length in scenario.chunks:
        tokens = _prompts(scenario, start, length)
        cache, out = engine._logits(engine.weights, cache, tokens, np.int32(start), lengths)
        out = np.asarray(out).astype(np.float64)
        for b, row in enumerate(scenario.rows):
            count = max(min(row.prompt - start, length), 0)
            part = out[b, :count, : logits[b].shape[1]]
            top = part.max(axis=-1, keepdims=True) if count else part
            total = np.exp(part - top).sum(axis=-1, keepdims=True)
            logits[b][start : start + count] = part - top - np.log(total)
        start += length
    return cache


def _decode(engine: Engine, scenario: Scenario, cache: Cache, logits: list[np.ndarray]) -> Cache:
    """Prefill and decode steps as `Engine.prefill` and `Engine.decode_many` make them.

    The tokens are the text's own, whatever the engine would choose.
    """
    texts, batch, vocab = scenario.rows, len(scenario.rows), engine.config.vocab_size
    plan, params = plan_rows([Sampling()] * batch, vocab, top_logprobs=vocab)
    lengths = np.array([row.prompt for row in scenario.rows], np.int32)
    totals = np.array([len(row.tokens) for row in scenario.rows], np.int32)
    last = jnp.zeros((batch, engine.config.hidden_size), activation_dtype(engine.cache_dtype))
    start = 0
    for length in scenario.chunks:
        tokens = _prompts(scenario, start, length)
        cache, last = engine._prefill_chunk(
            engine.weights, cache, last, tokens, np.int32(start), lengths
        )
        start += length
    state, emitted = engine._begin(engine.weights, last, (lengths, totals, None), params, plan)
    rows = Rows(cache=cache, **state)
    _keep(logits, emitted, lengths - 1, totals)
    for step in range(int((totals - lengths).max()) + scenario.idle):
        at = lengths + step
        forced = [row.tokens[min(p, len(row.tokens) - 1)] for row, p in zip(texts, at, strict=True)]
        rows = dataclasses.replace(
            rows, token=jnp.asarray(forced, jnp.int32), done=jnp.asarray(at >= totals)
        )
        rows, emitted = engine.decode_step(rows, params, plan)
        _keep(logits, emitted, at, totals)
    return rows.cache


def _keep(
    logits: list[np.ndarray], emitted: Emitted, at: Int[np.ndarray, "B"], totals: np.ndarray
) -> None:
    """Puts each row's log-probabilities in their place; all of them come as the likeliest V."""
    likeliest = emitted.choice.logprobs
    assert likeliest is not None
    ids = np.asarray(likeliest.top_ids)
    values = np.asarray(likeliest.top).astype(np.float64)
    for b in np.flatnonzero(at < totals):
        in_use = (ids[b] >= 0) & (ids[b] < logits[b].shape[1])
        logits[b][at[b], ids[b][in_use]] = values[b][in_use]
