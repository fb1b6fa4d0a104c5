"""Sampling against transformers' own logits processors, in the order its `generate` puts them.

Needs the 'parity' extra; every run draws afresh from QWEN_JAX_LIVE_SEED (see test_parity_live).
"""

import os

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="live parity needs pip install '.[hf]'")
pytest.importorskip("transformers", reason="live parity needs pip install '.[hf]'")

import torch
from transformers import GenerationConfig

from pallas_kernels.sample_tokens.reference import gumbel
from qwen_jax.engine.sampling import Sampling
from tests import transformers_reference
from tests.golden_cases import odd_config
from tests.test_sampling import choose_rows, columns, counts, keep
from tests.tiny_checkpoints import random_parameters

pytestmark = pytest.mark.live

ROWS, VOCAB = 100, 40
SEEDS = np.random.default_rng([int(os.environ["QWEN_JAX_LIVE_SEED"]), 2]).integers(2**31, size=3)

# name -> one draw of it; temperature 1 is in all, since greedy text takes no filter.
SETTINGS = {
    "temperature": lambda rng: {"temperature": float(rng.uniform(0.05, 5))},
    "top_k": lambda rng: {"top_k": int(rng.integers(1, VOCAB + 5))},
    "top_p": lambda rng: {"top_p": float(rng.uniform(0.01, 1))},
    "min_p": lambda rng: {"min_p": float(rng.uniform(0, 1))},
    "repetition_penalty": lambda rng: {"repetition_penalty": float(rng.uniform(0.5, 3))},
    "logit_bias": lambda rng: {
        "logit_bias": {int(t): float(rng.normal(0, 3)) for t in rng.choice(VOCAB, 5)}
    },
}


@pytest.fixture(scope="module")
def reference() -> object:
    """Any model will do: its `generate` knows which processors to make, and in which order."""
    config = odd_config(num_layers=1, vocab_size=VOCAB)
    return transformers_reference.model(config, random_parameters(config))


def their_scores(
    reference: object, row: Sampling, text: list[int], logits: np.ndarray
) -> np.ndarray:
    config = GenerationConfig(
        do_sample=True,
        temperature=row.temperature,
        top_k=row.top_k,
        top_p=row.top_p,
        min_p=row.min_p or None,
        repetition_penalty=row.repetition_penalty,
        sequence_bias={(t,): b for t, b in row.logit_bias.items()} or None,
    )
    processors = reference._get_logits_processor(  # type: ignore[attr-defined]
        config, input_ids_seq_length=len(text), device="cpu"
    )
    out: np.ndarray = processors(torch.tensor([text]), torch.from_numpy(logits[None]))[0].numpy()
    return out


def draw_rows(names: list[str], seed: int) -> list[Sampling]:
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(ROWS):
        chosen = {"temperature": 1.0, "seed": row}
        for name in names:
            chosen |= SETTINGS[name](rng)
        rows.append(Sampling(**chosen))
    return rows


@pytest.mark.parametrize("seed", SEEDS.tolist())
@pytest.mark.parametrize("names", [[name] for name in SETTINGS] + [list(SETTINGS)], ids="+".join)
def test_draws_are_those_from_transformers_scores(
    reference: object, names: list[str], seed: int
) -> None:
    """The same noise on their processed scores, or ours: the same token, row by row."""
    rng = np.random.default_rng([seed, 1])
    rows = draw_rows(names, seed)
    logits = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    prompts = [rng.integers(0, VOCAB, 6).tolist() for _ in rows]
    answers = [rng.integers(0, VOCAB, 4).tolist() for _ in rows]
    theirs = np.stack(
        [
            their_scores(reference, row, prompts[i] + answers[i], logits[i])
            for i, row in enumerate(rows)
        ]
    )
    tokens, asked = counts(prompts, answers, VOCAB), columns(rows)
    for step in range(5):
        ours = choose_rows(logits, rows, tokens=tokens, step=step).token
        ids = jnp.broadcast_to(jnp.arange(VOCAB), theirs.shape)
        noise = gumbel(asked.seed, jnp.full(ROWS, step, jnp.int32), ids)
        np.testing.assert_array_equal(ours, (theirs + np.asarray(noise)).argmax(axis=1))


@pytest.mark.parametrize("seed", SEEDS.tolist())
@pytest.mark.parametrize("names", [["top_k"], ["top_p"], ["min_p"], ["top_k", "top_p", "min_p"]])
def test_filters_keep_what_transformers_keeps(
    reference: object, names: list[str], seed: int
) -> None:
    rows = draw_rows(names, seed)
    logits = np.random.default_rng([seed, 1]).normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    ours = np.asarray(keep(jnp.asarray(logits), columns(rows)))
    theirs = [their_scores(reference, row, [0], x) for row, x in zip(rows, logits, strict=True)]
    np.testing.assert_array_equal(ours, np.stack(theirs))
    assert 1 < np.isfinite(ours).sum(axis=1).mean() < VOCAB


@pytest.mark.parametrize("seed", SEEDS.tolist())
def test_top_k_keeps_the_ties_transformers_keeps(reference: object, seed: int) -> None:
    rows = draw_rows(["top_k"], seed)
    logits = np.random.default_rng([seed, 1]).integers(0, 6, (ROWS, VOCAB)).astype(np.float32)
    ours = np.asarray(keep(jnp.asarray(logits), columns(rows)))
    theirs = [their_scores(reference, row, [0], x) for row, x in zip(rows, logits, strict=True)]
    np.testing.assert_array_equal(ours, np.stack(theirs))
