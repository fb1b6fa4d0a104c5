"""How far two tensors are apart: errors, cosine, ULPs, non-finite values; of logits also KL."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Shaped

from qwen_jax.accuracy import spread

TOP_K = 5


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The error of one tensor, over its elements that are finite on both sides.

    Attributes:
        max_abs: the largest |candidate - reference|.
        rms_abs: the root mean square of candidate - reference.
        max_rel: `max_abs` over the reference's largest magnitude.
        rms_rel: `rms_abs` over the reference's root mean square.
        nmse: the squared error's sum over that of the reference, `rms_rel` squared.
        cosine: of the angle between the two as vectors.
        max_ulp: representable numbers from the candidate to the reference rounded to `dtype`,
            at the element where it is most. One next to zero can have very many.
        median_ulp: the same, of the median element.
        nans: NaNs of the candidate.
        infs: infinities of the candidate where the reference has another value; a masked score
            that is -inf on both sides is no error.
        first_bad: the index of the first of those NaNs and infinities.
        dtype: the one the ULPs are of.
    """

    max_abs: float
    rms_abs: float
    max_rel: float
    rms_rel: float
    nmse: float
    cosine: float
    max_ulp: int
    median_ulp: float
    nans: int
    infs: int
    first_bad: tuple[int, ...] | None
    dtype: str


def metrics(
    candidate: Shaped[np.ndarray, "*shape"],
    reference: Shaped[np.ndarray, "*shape"],
    dtype: np.dtype | None = None,
) -> Metrics:
    """The error of `candidate`, counted in ULPs of `dtype`, by default its own.

    Raises:
        ValueError: the shapes differ.
    """
    if candidate.shape != reference.shape:
        raise ValueError(f"shapes {candidate.shape} and {reference.shape} differ")
    dtype = np.dtype(candidate.dtype if dtype is None else dtype)
    c, r = candidate.astype(np.float64), reference.astype(np.float64)
    same = np.isfinite(c) & np.isfinite(r)
    bad = ~np.isfinite(c) & (c != r)
    nans = int(np.isnan(c).sum())
    first = tuple(map(int, np.argwhere(bad)[0])) if bad.any() else None
    # Nearly always all are: picking them out takes as long as the rest.
    c, r = (c.ravel(), r.ravel()) if same.all() else (c[same], r[same])
    ulps = ulp_distance(c.astype(dtype), r.astype(dtype))
    error = np.abs(c - r)
    squares, power = float(error @ error), float(r @ r)
    max_abs = float(error.max(initial=0))
    count = max(c.size, 1)
    return Metrics(
        max_abs=max_abs,
        rms_abs=(squares / count) ** 0.5,
        max_rel=_ratio(max_abs, float(np.abs(r).max(initial=0))),
        rms_rel=_ratio(squares, power) ** 0.5,
        nmse=_ratio(squares, power),
        cosine=_cosine(float(c @ r), float(c @ c), power),
        max_ulp=int(ulps.max(initial=0)),
        median_ulp=float(np.median(ulps)) if ulps.size else 0.0,
        nans=nans,
        infs=int(bad.sum()) - nans,
        first_bad=first,
        dtype=dtype.name,
    )


def _ratio(error: float, size: float) -> float:
    return error / size if size else (float("inf") if error else 0.0)


def _cosine(dot: float, power: float, other: float) -> float:
    """1 for two zero vectors, 0 where only one is zero."""
    if power == 0 or other == 0:
        return float(power == other)
    return dot / (power**0.5 * other**0.5)


def ulp_distance(
    a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"]
) -> Shaped[np.ndarray, "*shape"]:
    """Steps between neighbouring numbers of their common dtype from a to b, uint64."""
    x, y = _ordinal(a), _ordinal(b)
    # Wraps around to the right answer where the difference is beyond an int64.
    return np.maximum(x, y).view(np.uint64) - np.minimum(x, y).view(np.uint64)


def _ordinal(x: np.ndarray) -> np.ndarray:
    """int64 that count up as floats do: IEEE 754's sign and magnitude as two's complement."""
    width = 8 * x.dtype.itemsize
    bits = x.view(f"int{width}").astype(np.int64)
    return np.where(bits < 0, -(bits & (2 ** (width - 1) - 1)), bits)


@dataclasses.dataclass(frozen=True)
class LogitMetrics:
    """What two distributions over the next token share.

    Attributes:
        kld: KL(reference || candidate) at each position, in nats.
        top1: the share of positions with the same likeliest token.
        topk: of the reference's k likeliest tokens, the share among the candidate's k.
        k: as in `topk`.
    """

    kld: Float[np.ndarray, "T"]
    top1: float
    topk: float
    k: int

    @property
    def mean_kld(self) -> float:
        return float(self.kld.mean())

    @property
    def max_kld(self) -> float:
        return float(self.kld.max())


def logit_metrics(
    candidate: Float[np.ndarray, "T V"], reference: Float[np.ndarray, "T V"], k: int = TOP_K
) -> LogitMetrics:
    """Compares logits (or log-probabilities) position by position."""
    k = min(k, candidate.shape[-1])

    def some(rows: slice) -> tuple[np.ndarray, int, int]:
        c, r = candidate[rows].astype(np.float64), reference[rows].astype(np.float64)
        top_c, top_r = (np.argpartition(-x, k - 1, axis=-1)[:, :k] for x in (c, r))
        both = (top_r[:, :, None] == top_c[:, None, :]) & ranked(c, r)[:, None, None]
        kld = kl_divergence(log_softmax(r), log_softmax(c))
        return kld, int(same_top(c, r).sum()), int(both.sum())

    found = spread.each(some, spread.parts(*candidate.shape))
    kld, same, shared = zip(*found, strict=True)
    steps = len(candidate)
    return LogitMetrics(np.concatenate(kld), sum(same) / steps, sum(shared) / (steps * k), k)


def ranked(c: Float[np.ndarray, "T V"], r: Float[np.ndarray, "T V"]) -> Bool[np.ndarray, "T"]:
    """Positions where both have an order: NumPy takes a row's first NaN for its largest value."""
    return ~(np.isnan(c) | np.isnan(r)).any(-1)


def same_top(c: Float[np.ndarray, "T V"], r: Float[np.ndarray, "T V"]) -> Bool[np.ndarray, "T"]:
    """Positions where both have the same likeliest token."""
    return (c.argmax(-1) == r.argmax(-1)) & ranked(c, r)


def first_not_finite(values: Float[np.ndarray, "T V"]) -> tuple[int, int] | None:
    """Where the first NaN or infinity stands, if there is one."""
    bad = ~np.isfinite(values)
    if not bad.any():
        return None
    position, token = map(int, np.argwhere(bad)[0])
    return position, token


def log_softmax(logits: Float[np.ndarray, "T V"]) -> Float[np.ndarray, "T V"]:
    """Log-probabilities in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def kl_divergence(
    base: Float[np.ndarray, "T V"], other: Float[np.ndarray, "T V"], floor: float = -np.inf
) -> Float[np.ndarray, "T"]:
    """KL(base || other) of log-probabilities, in nats: sum of p_base (ln p_base - ln p_other).

    Tokens whose log-probability in `base` is not above `floor` add nothing; with NaN it is NaN.
    """
    with np.errstate(invalid="ignore"):  # 0 (-inf - x), which counts as 0
        return np.where(base <= floor, 0, np.exp(base) * (base - other)).sum(-1)
