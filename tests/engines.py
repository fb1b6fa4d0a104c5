"""Engines over tiny random models, and a plain loop that drives one to the end."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Emitted, Engine, Prompt, Rows
from qwen_jax.engine.sampling import Plan, RowParameters, Sampling, plan_rows
from tests.golden_cases import Case
from tests.tiny_checkpoints import canonical


def device_parameters(params: Mapping[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    """Hugging Face parameters as the engine takes them: fused, norms float32, the rest `dtype`."""
    return {
        name: jnp.asarray(value, "float32" if name.endswith("norm") else dtype)
        for name, value in canonical(params).items()
    }


@functools.cache
def random_engine(
    config: ModelConfig, seed: int = 0, dtype: str = "float32", **options: Any
) -> Engine:
    """An engine over a golden case's parameters; made once, so that tests share its programs."""
    return Engine(config, device_parameters(Case(config, seed).parameters(), dtype), **options)


def random_tokens(config: ModelConfig, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """||ours - reference|| / ||reference||, in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


class Generated(NamedTuple):
    """What every row chose, in order, and the state it ended in."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    rows: Rows


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling] | None = None,
    *,
    chunk: int = 8,
    logprobs: bool = False,
) -> Generated:
    """Prefills and decodes until every row is done, `chunk` steps at a time."""
    plan, params = plan_rows(
        samplings or [Sampling()] * len(prompts), engine.config.vocab_size, logprobs=logprobs
    )
    rows, first = engine.prefill(prompts, plan, params)
    steps = [jax.tree.map(lambda x: np.asarray(x)[None], first)]
    while not np.asarray(rows.done).all():
        rows, emitted = engine.decode_many(rows, params, plan, chunk)
        steps.append(jax.tree.map(np.asarray, emitted))
    every: Emitted = jax.tree.map(lambda *parts: np.concatenate(parts), *steps)
    columns = range(len(prompts))
    return Generated(
        [every.choice.token[every.live[:, b], b].tolist() for b in columns],
        [every.choice.logprobs.chosen[every.live[:, b], b].tolist() for b in columns]
        if logprobs
        else [],
        rows,
    )


def decoded_logprobs(engine: Engine, tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities after every position, `[T, V]`, from decode steps fed `tokens` by force.

    Only the first token is prefilled. All log-probabilities come out as the top V.
    """
    vocab = engine.config.vocab_size
    plan, params = plan_rows([Sampling()], vocab, top_logprobs=vocab)
    rows, emitted = engine.prefill([Prompt(tokens[:1], len(tokens))], plan, params)
    out = np.full((len(tokens), vocab), -np.inf, np.float32)
    for i in range(len(tokens)):
        if i > 0:
            rows, emitted = force(engine, rows, params, plan, tokens[i])
        likeliest = emitted.choice.logprobs
        ids = np.asarray(likeliest.top_ids[0])
        out[i, ids[ids >= 0]] = np.asarray(likeliest.top[0])[ids >= 0]
    return out


def force(
    engine: Engine, rows: Rows, params: RowParameters, plan: Plan, token: int
) -> tuple[Rows, Emitted]:
    """One decode step after `token`, whatever was chosen before."""
    forced = dataclasses.replace(rows, token=jnp.full_like(rows.token, token))
    return engine.decode_step(forced, params, plan)
