"""Differences and how sure they are: against scipy.stats, by hand, and by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ndtri

from qwen_jax.experiments.answers import statistics
from qwen_jax.experiments.answers.statistics import LEVEL, Values

Pair = Callable[[np.random.Generator], tuple[Values, Values]]


def normal(units: int, seeds: int, *, of_unit: float, of_seed: float, rest: float) -> Pair:
    """Differences of mean 0 with parts of units, of seeds and of both."""

    def draw(rng: np.random.Generator) -> tuple[Values, Values]:
        found = rng.normal(0, of_unit, (units, 1)) + rng.normal(0, of_seed, (1, seeds))
        return found + rng.normal(0, rest, (units, seeds)), np.zeros((units, seeds))

    return draw


def verdicts(units: int, seeds: int, one: float, other: float) -> Pair:
    """Right or wrong with these probabilities; what is hard for one is hard for the other."""

    def draw(rng: np.random.Generator) -> tuple[Values, Values]:
        hard = rng.normal(size=(units, 1))
        noise = rng.normal(size=(2, units, seeds))
        both = (0.8 * hard + 0.6 * noise) < ndtri([one, other])[:, None, None]
        return both[0].astype(float), both[1].astype(float)

    return draw


def skewed(rng: np.random.Generator) -> tuple[Values, Values]:
    """As KL divergences are: positive, and some much larger than most; means are equal."""
    base = rng.lognormal(0, 1, (60, 1))
    return base * rng.gamma(2, 0.5, (60, 1)), base


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is simulated many times needs no quantiles of ten thousand samples."""
    monkeypatch.setattr(statistics, "_RESAMPLES", 1000)
    statistics._draws.cache_clear()
    yield
    statistics._draws.cache_clear()


def covered(draw: Pair, truth: float, crossed: bool, times: int = 400) -> float:
    """How often the interval holds the true difference."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(times):
        ours, theirs = draw(rng)
        limits = statistics.paired(ours, theirs, crossed=crossed).interval(LEVEL)
        assert limits is not None
        hits += limits[0] <= truth <= limits[1]
    return hits / times


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("draw", "truth", "crossed"),
    [
        (normal(30, 1, of_unit=1, of_seed=0, rest=0.5), 0.0, False),
        (normal(30, 4, of_unit=1, of_seed=0, rest=3), 0.0, False),
        (normal(30, 4, of_unit=1, of_seed=0.5, rest=1), 0.0, True),
        (verdicts(40, 1, 0.9, 0.7), 0.2, False),
        (verdicts(40, 1, 0.95, 0.95), 0.0, False),
        (verdicts(100, 3, 0.9, 0.8), 0.1, False),
        (skewed, 0.0, False),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(
    draw: Pair, truth: float, crossed: bool
) -> None:
    """Three standard errors of 400 draws below 95 %, and one point for tails that the samples
    lack; verdicts, which are whole numbers, may be held more often."""
    assert covered(draw, truth, crossed) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400) - 0.01


@pytest.mark.usefixtures("few_resamples")
def test_a_seed_that_shifts_all_units_is_in_the_error() -> None:
    """An unpaired or one-way error would be ten times too small."""
    draw = normal(60, 5, of_unit=0.1, of_seed=1, rest=0.1)
    assert covered(draw, 0.0, crossed=True) > 0.9 > 0.3 > covered(draw, 0.0, crossed=False)


@pytest.mark.usefixtures("few_resamples")
def test_luck_alone_is_rarely_called_better() -> None:
    """Of five equal settings the best and the worst are compared, which were found by looking."""
    rng, wrong = np.random.default_rng(7), 0
    for _ in range(300):
        hard = rng.normal(size=(60, 1))
        values = (hard + rng.normal(size=(60, 5)) < 1).astype(float)
        order = np.argsort(values.mean(axis=0))
        best = values[:, order[-1:]]
        found = [statistics.paired(values[:, i : i + 1], best).p for i in order[:-1]]
        p = [value for value in found if value is not None]
        assert len(p) == 4
        wrong += min(statistics.holm(p, 10)) < LEVEL
    assert wrong / 300 < LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / 300)


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_scipys_binomial_test(up: int, down: int) -> None:
    differences = np.array([1.0] * up + [-1.0] * down + [0.0] * 5)
    expected = stats.binomtest(up, up + down).pvalue if up + down else 1.0
    assert statistics.sign_test(differences) == pytest.approx(expected)


def test_few_numbers_are_judged_by_scipys_paired_t() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 8, 1))
    found = statistics.paired(ours, theirs)
    expected = stats.ttest_rel(ours[:, 0], theirs[:, 0])
    interval = expected.confidence_interval(0.99)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval(0.01) == pytest.approx((interval.low, interval.high))


def test_values_that_have_nothing_in_common_are_judged_by_scipys_welch() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(size=7).tolist(), (3 * rng.normal(size=9) + 1).tolist()
    found, expected = (
        statistics.unpaired(ours, theirs),
        stats.ttest_ind(ours, theirs, equal_var=False),
    )
    limits = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval(LEVEL) == pytest.approx((limits.low, limits.high))
    assert statistics.unpaired([1.0], [2.0, 3.0]).p is None


def test_skew_is_that_of_scipys_studentised_bootstrap() -> None:
    """The limits of a skewed sample; scipy has no studentised bootstrap, so it resamples t."""
    sample = np.random.default_rng(5).lognormal(0, 1, 50)
    found = statistics.paired(sample[:, None], np.zeros((50, 1))).interval(LEVEL)
    mean, error = sample.mean(), stats.sem(sample)

    def t(drawn: np.ndarray, axis: int) -> np.ndarray:
        return (drawn.mean(axis=axis) - mean) / stats.sem(drawn, axis=axis)

    again = stats.bootstrap(
        (sample,), t, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    )
    low, high = np.quantile(again.bootstrap_distribution, (0.025, 0.975))
    assert found is not None and high < 1.96 < -low
    # Above it is Student's at least, and the two draw different samples.
    assert found[1] == pytest.approx(mean - low * error, rel=0.03)
    assert found[0] == pytest.approx(mean - stats.t.ppf(0.975, 49) * error, rel=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 8))
def test_holm_by_its_definition(p: list[float], more: int) -> None:
    count = len(p) + more
    corrected, levels = statistics.holm(p, count), statistics.levels(p, count)
    for value, found, level in zip(p, corrected, levels, strict=True):
        before = [other for other in p if other <= value]
        ranks = [sorted(p).index(other) for other in before]
        expected = max(min(1.0, (count - r) * o) for r, o in zip(ranks, before, strict=True))
        assert found == pytest.approx(expected)
        # Being below one's level is being below 5 % when corrected, but for rounding.
        assert (value <= level) == (found <= LEVEL) or abs(found - LEVEL) < 1e-9


def test_what_a_share_is() -> None:
    third = np.array([0.0, 1 / 3, 2 / 3, 1.0])
    assert statistics.parts_of(np.array([0.0, 1.0])) == 1
    assert statistics.parts_of(third) == 3
    assert statistics.parts_of(np.array([0.5, 0.25])) == 4
    assert statistics.parts_of(np.array([2.0, 0.0])) == 0
    assert statistics.parts_of(np.random.default_rng(0).random(5)) == 0


def test_equal_verdicts_are_no_proof() -> None:
    """Forty times the same leaves room for a difference; a bootstrap alone would leave none."""
    same = np.ones((40, 1))
    found = statistics.paired(same, same)
    limits = found.interval(LEVEL)
    assert found.p == 1 and limits is not None
    # Agresti and Min: n + 2 pairs, with half of one in each cell.
    assert limits[1] == pytest.approx(stats.t.ppf(0.975, 39) / 42, rel=0.02)
    # Numbers that are the same are the same.
    assert statistics.paired(5 * same, 5 * same).interval(LEVEL) == (0, 0)


@pytest.mark.usefixtures("few_resamples")
def test_so_many_more_units_do_show_it() -> None:
    """With the number that is asked for, the difference is seen four times in five."""
    rng = np.random.default_rng(11)
    ours = rng.normal(0.2, 1, (30, 1))
    ours += 0.2 - ours.mean()
    found = statistics.paired(ours, np.zeros((30, 1)))
    needed = round(statistics.units_needed(found, 30, LEVEL))
    assert found.p is not None and found.p > LEVEL and 100 < needed < 400
    spread = float(ours.std(ddof=1))
    seen = 0
    for _ in range(300):
        more = statistics.paired(rng.normal(0.2, spread, (needed, 1)), np.zeros((needed, 1)))
        seen += more.p is not None and more.p < LEVEL
    assert 0.7 < seen / 300 < 0.9


def test_no_number_of_units_makes_up_for_few_seeds() -> None:
    rng = np.random.default_rng(2)
    found = rng.normal(0, 1, (1, 3)) + rng.normal(0, 0.01, (50, 3))
    difference = statistics.paired(found, np.zeros((50, 3)))
    assert difference.p is not None and difference.p > LEVEL
    assert statistics.units_needed(difference, 50, LEVEL) == math.inf


def test_one_value_says_nothing() -> None:
    found = statistics.paired(np.ones((1, 1)), np.zeros((1, 1)))
    assert found.p is None and found.interval(LEVEL) is None


def test_the_difference_of_two_shares_lies_between_them() -> None:
    """All right against all wrong: the truth may be a little less apart, and can't be more."""
    found = statistics.paired(np.zeros((40, 1)), np.ones((40, 1)))
    low, high = found.interval(0.05) or (0, 0)
    assert low == -1 and -1 < high < -0.85
