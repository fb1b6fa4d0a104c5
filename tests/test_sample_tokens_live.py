"""What `sample_tokens` draws from against transformers' own logits processors, in their order.

Needs the 'parity' extra; every run draws afresh from QWEN_JAX_LIVE_SEED (see test_parity_live).
"""

import os

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="live parity needs pip install '.[hf]'")
pytest.importorskip("transformers", reason="live parity needs pip install '.[hf]'")

import torch
from transformers.generation import logits_process as theirs

from pallas_kernels.sample_tokens import Counts, Settings, pack, settings
from pallas_kernels.sample_tokens.reference import keep, process
from tests.kernels import sampling_cases as cases

pytestmark = pytest.mark.live

VOCAB = 151_936
SUMMED = 1e-6
"""How far apart sums of probabilities may be whose scores differ in float32's last bit."""

RNG = np.random.default_rng([int(os.environ["QWEN_JAX_LIVE_SEED"]), 17])


@jax.jit
def ours(logits: jax.Array, asked: Settings, counts: Counts) -> tuple[jax.Array, jax.Array]:
    """Scores over the temperature, and which of them are kept."""
    hot = process(logits, asked, None, counts, None) / asked.temperature[:, None]
    ids = np.broadcast_to(np.arange(logits.shape[1], dtype=np.int32), logits.shape)
    kept = keep(hot, ids, asked)
    return hot, kept & (hot - hot.max(axis=1, keepdims=True) >= asked.floor[:, None])


def warped(logits: np.ndarray, asked: dict[str, float], text: np.ndarray) -> np.ndarray:
    """transformers' scores of one row; its filters in float64, since its float32 sum of as many
    probabilities is off by some 1e-5."""
    scores = torch.from_numpy(logits[None].copy())
    ids = torch.from_numpy(text[None].astype(np.int64))
    processors = [
        theirs.RepetitionPenaltyLogitsProcessor(float(asked["repetition"])),
        theirs.TemperatureLogitsWarper(float(asked["temperature"])),
    ]
    for processor in processors:
        scores = processor(ids, scores)
    filters = []
    if asked["top_k"]:
        filters.append(theirs.TopKLogitsWarper(int(asked["top_k"])))
    if asked["top_p"] < 1:
        filters.append(theirs.TopPLogitsWarper(float(asked["top_p"])))
    if asked["min_p"]:
        filters.append(theirs.MinPLogitsWarper(float(asked["min_p"])))
    scores = scores.double()
    for keep_some in filters:
        scores = keep_some(ids, scores)
    out: np.ndarray = scores[0].numpy()
    return out


def columns(rows: int) -> dict[str, np.ndarray]:
    """Every third row without top-k, without top-p and without min-p."""
    off = [np.arange(rows) % 3 == n for n in range(3)]
    return {
        "temperature": RNG.uniform(0.3, 2, rows),
        "repetition": RNG.uniform(0.7, 1.6, rows),
        "top_k": np.where(off[0], 0, RNG.integers(1, 300, rows)),
        "top_p": np.where(off[1], 1, RNG.uniform(0.05, 0.999, rows)),
        "min_p": np.where(off[2], 0, RNG.uniform(0, 0.2, rows)),
    }


@pytest.mark.parametrize("kind", ["peaked", "flat", "tied"])
@pytest.mark.parametrize(("rows", "vocab"), [(60, 40), (12, VOCAB)])
def test_what_is_kept_and_its_scores(kind: str, rows: int, vocab: int) -> None:
    logits = cases.LOGITS[kind](RNG, rows, vocab)
    texts = [RNG.integers(0, vocab, min(vocab // 4, 500)) for _ in range(rows)]
    asked = columns(rows)
    counts = Counts(pack(texts, vocab), np.zeros((rows, vocab), np.int32))
    hot, kept = map(np.asarray, ours(logits, settings(rows, **asked), counts))
    for row in range(rows):
        mine = {name: float(column[row]) for name, column in asked.items()}
        right = warped(logits[row], mine, texts[row])
        same = np.isfinite(right) & kept[row]
        # PyTorch may multiply by an inverse instead of dividing.
        np.testing.assert_allclose(hot[row][same], right[same], rtol=3e-7, err_msg=str(mine))
        assert_agrees(hot[row], kept[row], np.isfinite(right), mine)


def assert_agrees(
    hot: np.ndarray, ours: np.ndarray, theirs: np.ndarray, asked: dict[str, float]
) -> None:
    """The same tokens, of equal ones as many, but for what float32 sums leave open."""
    wide = hot.astype(np.float64)
    if asked["top_k"]:
        k = min(int(asked["top_k"]), len(hot))
        wide = np.where(wide >= np.sort(wide)[-k], wide, -np.inf)
    weights = np.exp(wide - wide.max())
    weights /= weights.sum()
    for value in np.unique(hot[ours != theirs]).astype(np.float64):
        equal = wide == value
        more = int(ours[equal].sum()) - int(theirs[equal].sum())
        if more == 0:
            assert equal.sum() > 1  # its sort is not stable
            continue
        (one,) = np.unique(weights[equal])
        below, up_to = weights[wide < value].sum(), weights[wide <= value].sum()
        by_p = below - SUMMED <= 1 - asked["top_p"] <= up_to + SUMMED
        by_min_p = abs(one / weights.max() - asked["min_p"]) <= SUMMED
        assert by_min_p or (by_p and (abs(more) - 1) * one <= SUMMED), (asked, value, more)
