"""Figures of two columns of log-probabilities, whatever made them.

KL(A || B) is estimated from tokens that A drew: k1, the mean of a - b, is unbiased and may be
negative; k3, the mean of (r - 1) - ln r with r = exp(b - a), is unbiased too, never negative, and
less noisy where A and B are near (J. Schulman, Approximating KL Divergence, 2020). Both hold only
if A drew the tokens from what it logged. Tokens of one text depend on each other, so standard
errors are clustered by text (Liang and Zeger, 1986, with the factor G / (G - 1) of G texts).

Importance ratios are exp(b - a): what a trainer B weighs tokens by that a server A drew. The
effective sample size of weights w is (sum w)^2 / sum w^2 (Kish, 1965).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from qwen_jax.accuracy.distribution.comparison import Estimate
from qwen_jax.accuracy.logprobs.reading import Logged
from qwen_jax.accuracy.measures.metrics import ulp_distance
from qwen_jax.errors import UserError

WORST, CONTEXT = 5, 8
ULPS = (1, 4, 16, 256)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One text in both logs, where its ids are the same: values that both have.

    Attributes:
        a, b: the lines.
        places: of the values among the tokens.
    """

    a: Logged
    b: Logged
    places: Int[np.ndarray, "n"]

    @property
    def values(self) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        return self.a.logprobs[self.places], self.b.logprobs[self.places]

    @property
    def difference(self) -> Float[np.ndarray, "n"]:
        """b - a, in nats."""
        a, b = self.values
        return b - a


@dataclasses.dataclass(frozen=True)
class Weights:
    """Importance ratios; each field in units of 1, `ess` as a share of their number."""

    mean: float
    max: float
    ess: float


@dataclasses.dataclass(frozen=True)
class Worst:
    """A token whose log-probabilities are far apart: which, and the ids before it."""

    name: str
    place: int
    token: int
    before: tuple[int, ...]
    a: float
    b: float


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of all pairs.

    Attributes:
        texts, tokens: how many.
        k1, k3: estimates of KL(A || B) in nats a token.
        max_abs, mean_abs: of b - a, in nats.
        by_token, by_text: importance ratios.
        ulps: share of tokens whose float32 values are at most so many numbers apart.
        worst: the tokens that are farthest apart.
    """

    texts: int
    tokens: int
    k1: Estimate
    k3: Estimate
    max_abs: float
    mean_abs: float
    by_token: Weights
    by_text: Weights
    ulps: tuple[tuple[int, float], ...]
    worst: tuple[Worst, ...]


def paired(
    a: Mapping[str, Logged], b: Mapping[str, Logged], names: tuple[str, str]
) -> tuple[list[Pair], list[tuple[Logged, Logged]]]:
    """Texts in both logs: those of the same ids, and those of others.

    Raises:
        UserError: no text is in both.
    """
    both = [name for name in a if name in b]
    if not both:
        raise UserError(
            f"{names[0]} and {names[1]} have no text in common: ids such as "
            f"{next(iter(a))!r:.40} and {next(iter(b))!r:.40}; give the same 'id' to the same text."
        )
    same, others = [], []
    for name in both:
        one, other = a[name], b[name]
        prompts = None in (one.prompt, other.prompt) or one.prompt == other.prompt
        if prompts and np.array_equal(one.tokens, other.tokens):
            there = ~np.isnan(one.logprobs) & ~np.isnan(other.logprobs)
            same.append(Pair(one, other, np.flatnonzero(there)))
        else:
            others.append((one, other))
    return same, others


def figures(pairs: Sequence[Pair]) -> Figures | None:
    """None where there is not one value in both."""
    pairs = [pair for pair in pairs if pair.places.size]
    if not pairs:
        return None
    each = [pair.difference for pair in pairs]
    with np.errstate(over="ignore"):
        k3 = [np.expm1(x) - x for x in each]
    d = np.concatenate(each)
    a, b = (np.concatenate([pair.values[i] for pair in pairs]) for i in (0, 1))
    apart = ulp_distance(a.astype(np.float32), b.astype(np.float32))
    return Figures(
        texts=len(pairs),
        tokens=len(d),
        k1=clustered([-x for x in each]),
        k3=clustered(k3),
        max_abs=float(np.abs(d).max()),
        mean_abs=float(np.abs(d).mean()),
        by_token=weights(d),
        by_text=weights(np.array([x.sum() for x in each])),
        ulps=tuple((k, float(np.mean(apart <= k))) for k in ULPS),
        worst=_worst(pairs),
    )


def clustered(groups: Sequence[Float[np.ndarray, "n"]]) -> Estimate:
    """The mean over all values, and its standard error where groups are independent; NaN of one
    group alone, of which none can be told."""
    count = sum(map(len, groups))
    mean = float(np.concatenate(groups).sum() / count)
    if len(groups) < 2:
        return Estimate(mean, float("nan"))
    with np.errstate(invalid="ignore"):
        sums = np.array([(group - mean).sum() for group in groups])
    factor = len(groups) / (len(groups) - 1)
    return Estimate(mean, float((factor * (sums**2).sum()) ** 0.5 / count))


def weights(logs: Float[np.ndarray, "n"]) -> Weights:
    """Of logarithms of weights; infinite where float64 can't hold one."""
    top = logs.max()
    relative = np.exp(logs - top)
    with np.errstate(over="ignore"):
        scale = float(np.exp(top))
    share = float(relative.sum() ** 2 / (relative**2).sum() / len(logs))
    return Weights(float(relative.mean() * scale), scale, share)


def _worst(pairs: Sequence[Pair]) -> tuple[Worst, ...]:
    found = [
        (abs(float(pair.difference[i])), pair, int(pair.places[i]))
        for pair in pairs
        for i in np.argsort(-np.abs(pair.difference), kind="stable")[:WORST]
    ]
    found.sort(key=lambda one: -one[0])
    out = []
    for size, pair, place in found[:WORST]:
        if size > 0:
            known = pair.a if pair.a.prompt is not None else pair.b
            at = place + len(known.prompt or ())
            before = known.whole[max(at - CONTEXT, 0) : at]
            a, b = float(pair.a.logprobs[place]), float(pair.b.logprobs[place])
            ids = tuple(map(int, before))
            out.append(Worst(pair.a.name, place, int(pair.a.tokens[place]), ids, a, b))
    return tuple(out)
