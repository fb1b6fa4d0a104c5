"""The kernel that chooses tokens against its definition on the CPU, at the real vocabulary."""

import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pallas_kernels.sample_tokens import Choice, Settings, sample_tokens, settings
from tests.kernels import sampling_cases as cases

SEED = secrets.randbits(31)
VOCAB = 151_936
ROWS = (1, 20, 64, 150)
"""In clusters of eight, four, two and one block."""

kernel = jax.jit(
    lambda *args, **how: sample_tokens(*args, implementation="mosaic_gpu", **how),
    static_argnames=("valid_tokens", "top_logprobs"),
)


def run(case: cases.Case) -> Choice:
    choice = kernel(case.logits, case.settings, case.step, **case.keywords())
    return jax.device_get(choice)


def defined(case: cases.Case) -> Choice:
    with jax.default_device(jax.devices("cpu")[0]):
        return cases.defined(case)


def check(case: cases.Case) -> int:
    choice, right = run(case), defined(case)
    with jax.default_device(jax.devices("cpu")[0]):
        return cases.assert_chosen(choice, case, right)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", cases.LOGITS)
def test_rows_that_ask_for_everything(kind: str, rows: int) -> None:
    """The same tokens; a row in a thousand may be a tie of float32."""
    case = cases.drawn(np.random.default_rng([SEED, rows]), kind, rows, VOCAB)
    ties = check(case)
    print(f"{kind}, {rows} rows: {ties} ties ({SEED=})")
    assert ties <= 1


@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_a_row_does_not_depend_on_its_neighbours(kind: str) -> None:
    """Bit for bit, in whatever number of blocks."""
    rng = np.random.default_rng(SEED)
    whole = cases.drawn(rng, kind, ROWS[-1], VOCAB)
    everywhere = run(whole)
    for rows in (*ROWS[:-1], 7):
        at = rng.choice(ROWS[-1], rows, replace=False)
        part = run(rows_of(whole, at))
        for mine, right in zip(jax.tree.leaves(part), jax.tree.leaves(everywhere), strict=True):
            np.testing.assert_array_equal(mine, right[at])


def rows_of(case: cases.Case, at: np.ndarray) -> cases.Case:
    picked: cases.Case = jax.tree.map(lambda x: x[at] if np.ndim(x) else x, case)
    return picked


def small(logits: np.ndarray, asked: Settings) -> np.ndarray:
    """Tokens of rows with the same few logits and seeds of their own."""
    rows = len(asked.seed)
    vocab = -(-len(logits) // 4) * 4
    wide = np.full((rows, vocab), -np.inf, np.float32)
    wide[:, : len(logits)] = logits
    choice = kernel(wide, asked, np.zeros(rows, np.int32), valid_tokens=len(logits), top_logprobs=1)
    return np.asarray(choice.token)


PROBABILITIES = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
DISTRIBUTIONS: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [40, 25, 15, 10, 6, 4]),
    ({"temperature": 0.5}, [1600, 625, 225, 100, 36, 16]),
    ({"top_k": 3}, [40, 25, 15]),
    ({"top_p": 0.82}, [40, 25, 15, 10]),
    ({"top_k": 4, "top_p": 0.7}, [40, 25]),
    ({"min_p": 0.2}, [40, 25, 15, 10]),
]


@pytest.mark.parametrize(("asked", "weights"), DISTRIBUTIONS)
def test_distributions_worked_out_by_hand(asked: dict[str, Any], weights: list[float]) -> None:
    """A chi-square test that one honest run in a hundred thousand fails."""
    rows = 4000
    seeds = np.random.default_rng(SEED).integers(0, 2**32, rows)
    logits = np.log(PROBABILITIES).astype(np.float32)
    tokens = small(logits, settings(rows, seed=seeds, **{"temperature": 1.0} | asked))
    observed = np.bincount(tokens, minlength=len(PROBABILITIES))
    assert not observed[len(weights) :].any()
    expected = rows * np.array(weights) / sum(weights)
    assert scipy.stats.chisquare(observed[: len(weights)], expected).pvalue > 1e-5


@pytest.mark.parametrize("rows", ROWS[:2])
def test_rows_that_are_not_finite_or_have_nothing_to_choose_are_reported(rows: int) -> None:
    rng = np.random.default_rng(SEED)
    for bad, column in ((np.nan, 77), (np.inf, VOCAB // 2)):
        case = cases.drawn(rng, "peaked", rows, VOCAB)
        case.logits[0, column] = bad
        right = check_flags(case)
        assert not right.finite[0]
    case = cases.drawn(rng, "peaked", rows, VOCAB)
    assert case.allowed is not None
    case.allowed[0] = 0
    right = check_flags(case)
    assert right.banned[0] and right.token[0] == -1


def check_flags(case: cases.Case) -> Choice:
    choice = run(case)
    right = defined(case)
    np.testing.assert_array_equal(choice.finite, right.finite)
    np.testing.assert_array_equal(choice.banned, right.banned)
    return choice


def test_logits_that_overflow_past_the_vocabulary_do_not_matter() -> None:
    case = cases.drawn(np.random.default_rng(SEED), "peaked", 2, VOCAB)
    right = run(case)
    case.logits[:, case.valid_tokens :] = np.nan
    for mine, theirs in zip(jax.tree.leaves(run(case)), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert right.finite.all()
    assert jnp.all(right.token < case.valid_tokens)
