"""`sample_tokens`: its definition against NumPy float64 and distributions worked out by hand, and
the kernel's thread code, emulated, against the definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.extend.random import threefry_2x32

from pallas_kernels.sample_tokens import (
    Choice,
    Counts,
    count,
    drawing,
    pack,
    pick,
    sample_tokens,
    search,
    settings,
    words,
)
from pallas_kernels.sample_tokens.noise import threefry
from pallas_kernels.sample_tokens.reference import gumbel, keep
from tests.kernels import emulated_sampling
from tests.kernels import sampling_cases as cases

VOCAB = 151_936
DRAWS = 5000

STATIC = ("valid_tokens", "top_logprobs", "draws", "implementation")
run = jax.jit(sample_tokens, static_argnames=STATIC)
kept_by_definition = jax.jit(keep)


# ---- The definition against float64


def kept_by_sorting(hot: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """What transformers' rules keep of one row, by a stable ascending sort, in float64."""
    hot = hot.astype(np.float64)
    kept = np.ones(len(hot), bool)
    if 0 < top_k < len(hot):
        kept &= hot >= np.sort(hot)[-top_k]
    if top_p < 1:
        weights = np.where(kept, np.exp(hot - hot.max()), 0)
        order = np.argsort(hot, kind="stable")
        cumulative = np.cumsum(weights[order]) / weights.sum()
        stays = cumulative > np.float64(np.float32(1 - top_p))
        stays[-1] = True
        kept[order[~stays]] = False
    return kept


FILTERS = [
    (0, 0.5),
    (0, 0.9),
    (0, 0.99),
    (0, 0.999),
    (0, 0.99999),
    (50, 0.9),
    (1000, 1.0),
    (3, 0.2),
]


@pytest.mark.parametrize("kind", cases.LOGITS)
def test_filters_keep_what_sorting_in_float64_keeps(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    hot = cases.LOGITS[kind](rng, len(FILTERS), VOCAB)
    asked = settings(
        len(FILTERS), temperature=1, top_k=[k for k, _ in FILTERS], top_p=[p for _, p in FILTERS]
    )
    ids = np.broadcast_to(np.arange(VOCAB, dtype=np.int32), hot.shape)
    found = np.asarray(kept_by_definition(hot, ids, asked))
    for row, (k, p) in enumerate(FILTERS):
        right = kept_by_sorting(hot[row], k, p)
        np.testing.assert_array_equal(found[row], right, err_msg=f"top_k={k}, top_p={p}")


def test_a_descending_float32_sum_would_keep_others() -> None:
    """That the test above can fail: what the rule is not."""
    hot = cases.peaked(np.random.default_rng(1), 1, VOCAB)[0]
    descending = -np.sort(-hot)
    weights = np.exp(descending - descending[0])
    cumulative = np.cumsum(weights / weights.sum(), dtype=np.float32)
    naive = int((cumulative - weights / weights.sum() < np.float32(0.99999)).sum())
    assert naive != kept_by_sorting(hot, 0, 0.99999).sum()


def test_random_bits_are_those_of_jax() -> None:
    seed, step = 0xDEADBEEF, 12345
    counters = np.arange(64, dtype=np.uint32)
    ours = threefry(jnp.uint32(seed), jnp.uint32(step), jnp.asarray(counters))
    both = np.concatenate([counters, 0 * counters])
    theirs = threefry_2x32(jnp.asarray([seed, step], jnp.uint32), jnp.asarray(both))
    np.testing.assert_array_equal(np.concatenate([np.asarray(x) for x in ours]), theirs)


def test_noise_has_the_gumbel_distribution() -> None:
    ids = jnp.broadcast_to(jnp.arange(100_000), (2, 100_000))
    noise = gumbel(jnp.arange(2, dtype=jnp.uint32), jnp.arange(2), ids)
    assert scipy.stats.kstest(np.asarray(noise).reshape(-1), "gumbel_r").pvalue > 1e-3
    assert scipy.stats.spearmanr(noise[0], noise[1]).pvalue > 1e-3


# ---- Four tokens by hand

FOUR = np.array([0.5, 0.25, 0.15, 0.1])
EQUAL = np.full(4, 0.25)

# settings -> what stays of FOUR, as weights
BY_HAND: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [50, 25, 15, 10]),
    ({"temperature": 0.5}, [2500, 625, 225, 100]),
    ({"top_k": 2}, [50, 25, 0, 0]),
    ({"top_k": 4}, [50, 25, 15, 10]),
    ({"top_p": 0.8}, [50, 25, 15, 0]),
    ({"top_p": 1e-30}, [50, 0, 0, 0]),
    ({"top_k": 3, "top_p": 0.8}, [50, 25, 0, 0]),
    ({"min_p": 0.4}, [50, 25, 0, 0]),
    ({"temperature": 0.5, "min_p": 0.09}, [2500, 625, 225, 0]),
    ({"repetition": 2.0}, [25, 25, 15, 10]),
    ({"presence": np.log(2)}, [50, 12.5, 15, 10]),
    ({"frequency": np.log(2)}, [50, 6.25, 15, 10]),
    ({"biased": 1}, [50, 25, 45, 10]),
    ({"masked": 1}, [0, 25, 15, 10]),
]
# And of EQUAL: as many as reach p, the highest ids; all that are tied with the k-th.
OF_EQUAL: list[tuple[dict[str, Any], list[float]]] = [
    ({"top_p": 0.5}, [0, 0, 1, 1]),
    ({"top_p": 0.51}, [0, 1, 1, 1]),
    ({"top_p": 0.01}, [0, 0, 0, 1]),
    ({"top_k": 1}, [1, 1, 1, 1]),
]


def test_distributions_worked_out_by_hand() -> None:
    """Chi-square tests of which one honest seed in a thousand fails; the seeds are fixed."""
    cases_by_hand = BY_HAND + OF_EQUAL
    columns = {
        name: np.repeat([asked.get(name, default) for asked, _ in cases_by_hand], DRAWS)
        for name, default in {
            "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0,
            "presence": 0.0, "frequency": 0.0, "biased": 0, "masked": 0,
        }.items()
    }  # fmt: skip
    rows = len(cases_by_hand) * DRAWS
    # The first logit is log 4, of which a repetition penalty of 2 leaves log 2.
    probabilities = np.array([FOUR] * len(BY_HAND) + [EQUAL] * len(OF_EQUAL))
    logits = np.repeat(np.log(probabilities * 8).astype(np.float32), DRAWS, axis=0)
    generated = np.tile(np.array([0, 2, 0, 0], np.int32), (rows, 1))
    repeats = columns["repetition"] != 1
    generated[repeats] = 0
    choice = run(
        logits,
        settings(rows, seed=np.arange(rows), **columns),
        np.zeros(rows, np.int32),
        valid_tokens=4,
        bias=np.tile(np.log(np.array([1, 1, 3, 1], np.float32)), (rows, 1)),
        counts=Counts(np.where(repeats, 0b01, 0b10).astype(np.uint32)[:, None], generated),
        allowed=np.full((rows, 1), 0b1110, np.uint32),
        top_logprobs=1,
    )
    tokens = np.asarray(choice.token).reshape(len(cases_by_hand), DRAWS)
    for (asked, weights), drawn in zip(cases_by_hand, tokens, strict=True):
        observed = np.bincount(drawn, minlength=4)
        expected = np.array(weights, float) / np.sum(weights)
        assert (observed[expected == 0] == 0).all(), asked
        possible = expected > 0
        if possible.sum() > 1:
            result = scipy.stats.chisquare(observed[possible], DRAWS * expected[possible])
            assert result.pvalue > 1e-3, (asked, observed)


# ---- What is reported


def choose_one(
    logits: list[float], *, past: float = 0, bias: float = 0, allowed: int = 0b1111, **asked: Any
) -> Choice:
    """Of four tokens and one past the vocabulary; `bias` is the first token's."""
    choice = run(
        np.array([[*logits, past]], np.float32),
        settings(1, **asked),
        np.zeros(1, np.int32),
        valid_tokens=4,
        bias=np.array([[bias, 0, 0, 0, 0]], np.float32),
        allowed=np.array([[allowed]], np.uint32),
        top_logprobs=2,
    )
    return jax.device_get(choice)


def test_a_program_without_draws_is_of_greedy_rows() -> None:
    logits = np.random.default_rng(3).normal(0, 3, (5, 300)).astype(np.float32)
    asked = settings(5, logprobs=2)
    both = [
        jax.device_get(run(logits, asked, np.zeros(5, np.int32), valid_tokens=299, draws=draws))
        for draws in (True, False)
    ]
    jax.tree.map(np.testing.assert_array_equal, *both)
    assert both[0].token.tolist() == logits[:, :299].argmax(axis=1).tolist()


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_with_nothing_to_choose_is_reported(temperature: float) -> None:
    choice = choose_one([1, 2, 3, 4], masked=1, temperature=temperature, allowed=0)
    assert choice.banned.all() and choice.finite.all() and choice.token.tolist() == [-1]
    choice = choose_one([1, 2, 3, 4], masked=1, temperature=temperature, allowed=0b100)
    assert not choice.banned.any() and choice.token.tolist() == [2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_reported(bad: float) -> None:
    assert not choose_one([1, bad, 3, 4]).finite.any()
    assert choose_one([1, 2, -np.inf, 4]).finite.all()
    assert not choose_one([-np.inf] * 4).finite.any()
    past_the_vocabulary = choose_one([1, 2, 3, 2], past=bad)
    assert past_the_vocabulary.finite.all() and past_the_vocabulary.token.tolist() == [2]


def test_log_probabilities_are_the_models_own() -> None:
    logits = np.array([1.0, 3, 2, 3])
    choice = choose_one(logits.tolist(), past=9, logprobs=2, biased=1, bias=9)
    right = logits - np.log(np.exp(logits).sum())
    assert choice.token.tolist() == [0]
    np.testing.assert_allclose(choice.logprobs.chosen, right[:1], rtol=1e-6)
    assert choice.logprobs.top_ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(choice.logprobs.top[0], right[[1, 3]], rtol=1e-6)
    only_chosen = choose_one(logits.tolist(), logprobs=0).logprobs
    np.testing.assert_allclose(only_chosen.chosen, right[1:2], rtol=1e-6)
    assert only_chosen.top_ids.tolist() == [[-1, -1]]


def test_tokens_are_counted_where_rows_live() -> None:
    vocab = 70
    counts = Counts(pack([[1, 33], [5]], vocab), np.zeros((2, vocab), np.int32))
    after = count(jax.tree.map(jnp.asarray, counts), jnp.array([69, 6]), jnp.array([True, False]))
    np.testing.assert_array_equal(after.seen, pack([[1, 33, 69], [5]], vocab))
    assert np.flatnonzero(after.generated).tolist() == [69]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"valid_tokens": 9}, "valid_tokens=9"),
        ({"valid_tokens": 0}, "valid_tokens=0"),
        ({"top_logprobs": 9}, "top_logprobs=9"),
        ({"step": np.zeros(3, np.int32)}, r"step is \(3,\)"),
        ({"settings": settings(3)}, r"settings.temperature is \(3,\)"),
        ({"bias": np.zeros((2, 4), np.float32)}, r"bias is \(2, 4\)"),
        ({"allowed": np.zeros((2, 2), np.uint32)}, r"allowed is \(2, 2\)"),
        (
            {"counts": Counts(np.zeros((2, 1), np.uint32), np.zeros((2, 9), np.int32))},
            r"counts.generated is \(2, 9\)",
        ),
    ],
)
def test_arguments_that_disagree_are_refused(changed: dict[str, Any], why: str) -> None:
    arguments = {
        "logits": np.zeros((2, 8), np.float32), "settings": settings(2),
        "step": np.zeros(2, np.int32), "valid_tokens": 8, "top_logprobs": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=why):
        sample_tokens(**arguments | changed)
    assert words(8) == 1


# ---- The kernel, emulated


@pytest.mark.parametrize(("kind", "blocks"), [("peaked", 2), ("flat", 1), ("tied", 1)])
def test_the_kernel_chooses_what_the_definition_does(
    monkeypatch: pytest.MonkeyPatch, kind: str, blocks: int
) -> None:
    """Rows that ask for everything; candidates that overflow, and scores searched bit by bit."""
    case = cases.drawn(np.random.default_rng(blocks), kind, 10, 2048)
    choice = emulated_sampling.run(
        monkeypatch, case.logits, case.settings, case.step, blocks=blocks, **case.keywords()
    )
    assert cases.assert_chosen(choice, case) == 0


@pytest.mark.parametrize(("kind", "searches"), [("flat", 0), ("constant", 9)])
def test_where_top_p_ends_among_many_tokens(
    monkeypatch: pytest.MonkeyPatch, kind: str, searches: int
) -> None:
    """By a histogram; where too many tokens are equal, by the search over bits."""
    case = cases.drawn(np.random.default_rng(7), kind, 10, 2048)
    top_p = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.99999, 1]
    asked = settings(10, temperature=1, top_p=top_p, seed=np.arange(10))
    case = case._replace(settings=asked)
    real, searched = search.Search.run, []

    def counted(self: search.Search) -> list[Any]:
        searched.append(self)
        return real(self)

    monkeypatch.setattr(search.Search, "run", counted)
    choice = emulated_sampling.run(
        monkeypatch, case.logits, case.settings, case.step, blocks=1, **case.keywords()
    )
    assert len(searched) == searches
    assert cases.assert_chosen(choice, case) == 0


def test_the_kernels_top_p_ends_where_float64_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among 151,936 tokens, to the token; in place of drawing it tells the last that is kept."""
    top_p = [0.8, 0.99, 0.99999]
    rng = np.random.default_rng(9)
    logits = np.concatenate([make(rng, 3, VOCAB) for make in (cases.flat, cases.peaked)])
    monkeypatch.setattr(drawing.Drawing, "draw", lambda self, about, threshold: threshold.first)
    asked = settings(6, temperature=1, top_p=top_p * 2)
    choice = emulated_sampling.run(
        monkeypatch, logits, asked, np.zeros(6, np.int32), valid_tokens=VOCAB, blocks=2
    )
    for row, p in enumerate(top_p * 2):
        kept = kept_by_sorting(logits[row], 0, p)
        if kept.sum() > pick.MOST:
            assert logits[row, choice.token[row]] == logits[row][kept].min(), (row, p)


def test_the_kernel_reports_rows_that_have_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.drawn(np.random.default_rng(3), "peaked", 4, 1024)
    case.logits[0, 7], case.logits[1, 1000], case.logits[3, -1] = np.nan, np.inf, np.nan
    assert case.allowed is not None
    case.settings.masked[:], case.allowed[2] = 1, 0
    choice = emulated_sampling.run(
        monkeypatch, case.logits, case.settings, case.step, **case.keywords()
    )
    assert choice.finite.tolist() == [False, False, True, True]
    assert choice.banned.tolist() == [False, False, True, False]
    assert choice.token[2] == -1
    assert 0 <= choice.token[3] < case.valid_tokens


def test_a_rows_settings_alone_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, log-probabilities too, in one block and in four, alone and among others."""
    case = cases.drawn(np.random.default_rng(5), "peaked", 6, 1024)
    case.settings.logprobs[:] = 3
    together = emulated_sampling.run(
        monkeypatch, case.logits, case.settings, case.step, blocks=1, **case.keywords()
    )
    for row in (2, 4):
        alone: Any = jax.tree.map(lambda x, row=row: x[row : row + 1] if np.ndim(x) else x, case)
        choice = emulated_sampling.run(
            monkeypatch, alone.logits, alone.settings, alone.step, blocks=4, **alone.keywords()
        )
        for mine, right in zip(jax.tree.leaves(choice), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(mine, right[row : row + 1])
