"""How sure a difference is: paired by unit, over seeds, corrected for how many there are.

A unit is what scores belong to: a prompt, a document, a window of a text. Its values under two
settings are taken from each other first, so that what makes one unit harder than the next is in
neither the difference nor its error.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import bdtr, ndtri, stdtr, stdtrit

LEVEL = 0.05
"""Of all differences in a table together: how often one that is none is called one."""

POWER = 0.8
"""How often the number of units that is asked for shows a difference as large as was seen."""

_RESAMPLES = 10_000
_MOST_DRAWN = 5_000_000
_BOOTSTRAPPED = range(10, 5001)
"""Units; fewer, drawn again, show no shape, and of more the mean is as good as normal."""
_MOST_PARTS = 64
_Z = float(ndtri(0.975))

Values = Float[np.ndarray, "units seeds"]


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean with its standard error.

    Attributes:
        error: None of a single value, which says nothing of how far another would lie from it.
        df: degrees of freedom of the error.
        of_seeds: the part of error² that more units would not lessen.
    """

    value: float
    error: float | None
    df: float
    of_seeds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two means, the first less the second.

    Attributes:
        test: what gives p, in words.
        exact: p, where a test of its own gives it, and not the interval's limits.
        skew: how many times as far as Student's an interval reaches down and up.
        most: what no difference can be more than, as 1 of shares.
    """

    mean: Mean
    test: str
    exact: float | None = None
    skew: tuple[float, float] = (1.0, 1.0)
    most: float = math.inf

    @property
    def p(self) -> float | None:
        """How likely luck alone makes at least as much; None where that can't be said."""
        if self.exact is not None or self.mean.error is None:
            return self.exact
        reach = self.mean.error * self.skew[self.mean.value < 0]
        return min(1.0, 2 * float(stdtr(self.mean.df, -abs(self.mean.value) / reach)))

    def interval(self, level: float) -> tuple[float, float] | None:
        """Where the difference lies but for `level`, a half of it on either side."""
        if self.mean.error is None:
            return None
        reach = self.mean.error * float(stdtrit(self.mean.df, 1 - level / 2))
        low, high = self.mean.value - reach * self.skew[0], self.mean.value + reach * self.skew[1]
        return max(low, -self.most), min(high, self.most)


def mean_of(values: Values, *, crossed: bool) -> Mean:
    """The mean over units and seeds.

    Args:
        crossed: whether a seed does something to all units alike, such as choosing the examples
            that all prompts show, and is not merely drawn anew for each. Its part of the error is
            then that of a two-way layout with random effects, with Satterthwaite's degrees of
            freedom (Searle, Casella and McCulloch, Variance Components, 1992, chapter 4).
    """
    units, seeds = values.shape
    value = float(values.mean())
    if units * seeds == 1:
        return Mean(value, None, 0)
    if units == 1:
        variance = float(values[0].var(ddof=1)) / seeds
        return Mean(value, variance**0.5, seeds - 1, variance)
    rows = values.mean(axis=1)
    of_units = float(rows.var(ddof=1)) / units
    if not crossed or seeds == 1:
        return Mean(value, of_units**0.5, units - 1)
    columns = values.mean(axis=0)
    rest = values - rows[:, None] - columns[None] + value
    degrees = (units - 1) * (seeds - 1)
    of_rest = float((rest**2).sum()) / degrees / (units * seeds)
    of_seeds = float(columns.var(ddof=1)) / seeds
    if of_seeds <= of_rest:
        return Mean(value, of_units**0.5, units - 1)
    variance = of_units + of_seeds - of_rest
    parts = of_units**2 / (units - 1) + of_seeds**2 / (seeds - 1) + of_rest**2 / degrees
    return Mean(value, variance**0.5, variance**2 / parts, of_seeds - of_rest)


def paired(
    ours: Values, theirs: Values, *, crossed: bool = True, verdicts: bool = True
) -> Difference:
    """Of values of the same units, in the same order.

    With the same number of seeds these are taken to be the same ones. Otherwise, and where seeds
    are drawn anew for each unit, a unit's mean over its seeds is what is compared.

    Args:
        verdicts: whether values that look like verdicts, or shares of them, are ones; else they
            are numbers like any others.
    """
    if not crossed or ours.shape != theirs.shape:
        ours, theirs = ours.mean(axis=1)[:, None], theirs.mean(axis=1)[:, None]
    found = ours - theirs
    parts = parts_of(np.concatenate([ours, theirs])) if verdicts else 0
    mean = mean_of(found, crossed=crossed)
    if mean.error is None:
        return Difference(mean, "one value each")
    if parts:
        mean = _with_doubt(mean, found)
    if mean.error == 0:  # All are the same; so many equal signs still say something.
        return Difference(mean, "sign test", sign_test(found.mean(axis=1)))
    if not parts:
        return Difference(mean, "paired, bootstrap", skew=_skew(found))
    skew = _skew_of_shares(found)
    if parts == 1 and found.shape[1] == 1:
        return Difference(mean, "McNemar, exact", sign_test(found[:, 0]), skew, most=1.0)
    return Difference(mean, "paired, bootstrap", skew=skew, most=1.0)


def parts_of(values: Float[np.ndarray, "..."]) -> int:
    """1 of verdicts, which are 0 or 1; k of shares that count among k, the least such k up to 64;
    0 of other numbers."""
    if not ((values >= 0) & (values <= 1)).all():
        return 0
    for parts in range(1, _MOST_PARTS + 1):
        scaled = values * parts
        if np.abs(scaled - np.rint(scaled)).max() < 1e-9:
            return parts
    return 0


def unpaired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Of values that have nothing to do with each other: Welch's test."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    value = float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Difference(Mean(value, None, 0), "one value each")
    one, other = float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
    variance = one + other
    if variance == 0:
        return Difference(Mean(value, None, 0), "no spread")
    df = variance**2 / (one**2 / (len(a) - 1) + other**2 / (len(b) - 1))
    return Difference(Mean(value, variance**0.5, df), "Welch")


def sign_test(differences: Float[np.ndarray, " units"]) -> float:
    """The exact two-sided test of whether as many are above 0 as below. Of the differences of
    verdicts this is McNemar's (1947)."""
    up, down = int((differences > 0).sum()), int((differences < 0).sum())
    return min(1.0, 2 * float(bdtr(min(up, down), up + down, 0.5))) if up + down else 1.0


def holm(p: Sequence[float], count: int | None = None) -> list[float]:
    """Values of p corrected for how many there are (Holm, 1979), in the order they came.

    Args:
        count: of comparisons, where more were looked at than these.
    """
    count = len(p) if count is None else count
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (count - rank) * p[index]))
        corrected[index] = largest
    return corrected


def levels(p: Sequence[float], count: int | None = None) -> list[float]:
    """The level at which Holm's procedure tests each, so that intervals agree with it: once one
    is not below its level, all that follow stand at that one's."""
    count = len(p) if count is None else count
    found, stopped = [0.0] * len(p), None
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        found[index] = stopped or LEVEL / (count - rank)
        if p[index] > found[index]:
            stopped = found[index]
    return found


def units_needed(difference: Difference, units: int, level: float) -> float:
    """How many units in all would show, with a power of 80 %, a difference as large as the one
    seen; infinity where no number would."""
    mean = difference.mean
    assert mean.error is not None
    allowed = (mean.value / _reach(level, mean.df)) ** 2 - mean.of_seeds
    return (mean.error**2 - mean.of_seeds) * units / allowed if allowed > 0 else np.inf


def smallest_seen(difference: Difference, level: float) -> float:
    """The difference that these units would have shown with a power of 80 %."""
    assert difference.mean.error is not None
    return _reach(level, difference.mean.df) * difference.mean.error


def _reach(level: float, df: float) -> float:
    return float(stdtrit(df, 1 - level / 2) + ndtri(POWER))


def _with_doubt(mean: Mean, differences: Values) -> Mean:
    """With one more unit each that is better and worse by a half: equal verdicts on forty prompts
    are no proof that the next will be equal. For verdicts these are the pairs of Agresti and Min
    (Statistics in Medicine 24, 2005), half of one added to each of the four cells."""
    units = differences.shape[0]
    squares = float((differences.mean(axis=1) ** 2).sum()) + 1
    shrunk = mean.value * units / (units + 2)
    variance = (squares / (units + 2) - shrunk**2) / (units + 2) + mean.of_seeds
    assert mean.error is not None
    df = mean.df if mean.of_seeds else max(units - 1, 1)
    return dataclasses.replace(mean, error=max(variance, mean.error**2) ** 0.5, df=df)


def _skew(differences: Values) -> tuple[float, float]:
    """By the studentised bootstrap over units (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, section 12.5): means of skewed numbers, such as KL divergences, are off to one
    side, and by how much in their own standard errors is what resampling shows."""
    means = differences.mean(axis=1)
    units = len(means)
    if units not in _BOOTSTRAPPED:
        return 1.0, 1.0
    centred = means - means.mean()
    centred /= np.abs(centred).max()
    draws = _draws(units)
    drawn = draws @ centred.astype(np.float32)
    squares = draws @ (centred**2).astype(np.float32)
    errors = np.sqrt(np.maximum(squares - drawn**2, 0) / (units - 1))
    t = drawn[errors > 1e-4] / errors[errors > 1e-4]
    low, high = np.quantile(t, (0.025, 0.975)) / float(stdtrit(units - 1, 0.975))
    # Resampling few units knows no tails: no less than Student's on either side.
    return max(float(high), 1.0), max(float(-low), 1.0)


def _skew_of_shares(differences: Values) -> tuple[float, float]:
    """By the bootstrap over units, with the two that `_with_doubt` adds; a studentised one would
    divide by nothing wherever it draws equal verdicts."""
    units = differences.shape[0]
    if units not in _BOOTSTRAPPED or np.count_nonzero(differences.any(axis=1)) < 10:
        return 1.0, 1.0
    means = np.append(differences.mean(axis=1), [0.5**0.5, -(0.5**0.5)])
    drawn = _draws(units + 2) @ means.astype(np.float32)
    low, high = (np.quantile(drawn, (0.025, 0.975)) - drawn.mean()) / (_Z * drawn.std())
    return float(-low), float(high)


@functools.lru_cache(maxsize=4)
def _draws(count: int) -> Float[np.ndarray, "draws count"]:
    """What share each of `count` has in each sample with replacement; the same every time, so
    that a report made again says the same."""
    times = min(_RESAMPLES, max(1000, _MOST_DRAWN // count))
    drawn = np.random.default_rng(0).integers(0, count, (times, count))
    drawn += count * np.arange(times)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=times * count).reshape(times, count)
    return (counts / count).astype(np.float32)
