"""From a model's logits to the log-probabilities that an engine writes down, step by step.

The order is that of Hugging Face transformers' logits processors (see `engine.sampling`):
penalties, temperature, top-k, top-p, min-p. Each step is a field of `Path`, at its default where an
engine logs the model's own log-probabilities. All is float64 but for what a path rounds on
purpose.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from qwen_jax.accuracy.exact import carried
from qwen_jax.accuracy.exact.rounding import UNIT, round_interval, round_to

BLOCK = 32
"""Rows in float64 at a time: 32 of 151,936 take 39 MB."""

CLIP = 20.0

HEADS = (1 << 10, 1 << 14)
"""Likeliest tokens in which a top-p ends nearly always: to sort all of 151,936 takes ten times as
long as to find them."""

_U32 = UNIT["float32"]


class Align(NamedTuple):
    """Which token is looked up in the row after position j, and at which token it is written down,
    both counted from j."""

    token: int = 1
    written: int = 1


OWN_TOKEN = Align()
"""As it should be: the next token's, written at that token."""


@dataclasses.dataclass(frozen=True)
class Path:
    """How an engine comes from logits to what it logs.

    Attributes:
        logits: the dtype that logits are rounded to first.
        repetition_penalty, presence_penalty, frequency_penalty: as in `Sampling`.
        temperature: by which logits are divided.
        top_k, top_p, min_p: outside of which probabilities are zero, and those inside add up to 1.
        padding: rows of zeros, whose logits are 0, in the softmax beside the vocabulary's.
        softmax: the dtype in which every step of the log-softmax is rounded.
        logprobs: the dtype that the result is rounded to.
        align: which token's value is written at which token.
    """

    logits: str | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    padding: int = 0
    softmax: str | None = None
    logprobs: str | None = None
    align: Align = OWN_TOKEN

    @property
    def penalises(self) -> bool:
        found = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return found != (1.0, 0.0, 0.0)

    @property
    def filters(self) -> bool:
        return (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0)


class Rows(NamedTuple):
    """Some positions of a text.

    Attributes:
        logits: after each of the positions, float32.
        noise: how far a right engine's log-probabilities may be off there, of an unlikely token; or
            each of its logits, [T, V].
        whole: ids of the text, the prompt's too.
        prompt: how many of them are the prompt's.
        positions: of the rows.
        logged: what an engine wrote at each id of `whole`; NaN where nothing.
        others: ids that it wrote that of, where they are not those of the text.
        roundings: how often the bound of a float32 log-softmax's own roundings counts,
        sums: and that of its sum.
    """

    logits: Float[np.ndarray, "T V"]
    noise: Float[np.ndarray, "T ..."]
    whole: Int[np.ndarray, "n"]
    prompt: int
    positions: Int[np.ndarray, "T"]
    logged: Float[np.ndarray, "n"]
    others: Int[np.ndarray, "n"] | None = None
    roundings: float = 1.0
    sums: float = 1.0

    def take(self, rows: Int[np.ndarray, "n"] | slice) -> "Rows":
        return self._replace(
            logits=self.logits[rows], noise=self.noise[rows], positions=self.positions[rows]
        )

    def at(self, offset: int) -> Int[np.ndarray, "T"]:
        """Places in `whole` so many after the positions; -1 outside of it."""
        places = self.positions + offset
        return np.where((places >= 0) & (places < len(self.whole)), places, -1)


class Predicted(NamedTuple):
    """What a path would log, how far a right engine may be from it, and what was logged, NaN where
    there is nothing to compare; and half a step of the decimals that the log keeps."""

    value: Float[np.ndarray, "T"]
    limit: Float[np.ndarray, "T"]
    logged: Float[np.ndarray, "T"]
    digits: Float[np.ndarray, "T"]

    @property
    def there(self) -> Bool[np.ndarray, "T"]:
        return ~np.isnan(self.value) & ~np.isnan(self.logged)

    @property
    def error(self) -> Float[np.ndarray, "n"]:
        """Logged minus predicted, where both are; infinite where it is predicted as impossible."""
        return (self.logged - self.value)[self.there]

    @property
    def ratio(self) -> Float[np.ndarray, "n"]:
        """The error's size, beyond what the log's decimals cut off, over its limit."""
        size = np.maximum(np.abs(self.error) - self.digits[self.there], 0)
        with np.errstate(invalid="ignore"):
            return np.where(np.isinf(size), np.inf, size / self.limit[self.there])


def rms_nats(errors: Float[np.ndarray, "n"]) -> float:
    """The root mean square; from 20 nats on an error is as bad as any, since one token that can't
    be would outweigh all others."""
    return float(np.sqrt(np.mean(np.clip(errors, -CLIP, CLIP) ** 2)))


def predict(path: Path, rows: Rows, digits: float = 0.0, *, edges: bool = True) -> Predicted:
    """What an engine on this path would have logged.

    Args:
        digits: half a step of the decimals that the log keeps.
        edges: whether the limits count that a token may be in or out of top-k, top-p or min-p by
            rounding; without, a prediction costs a third, and its values are the same.
    """
    parts = [
        _predict(path, rows.take(slice(start, start + BLOCK)), digits, edges)
        for start in range(0, len(rows.positions), BLOCK)
    ]
    return Predicted(*map(np.concatenate, zip(*parts, strict=True)))


def _predict(path: Path, rows: Rows, digits: float, edges: bool) -> Predicted:
    asked, written = rows.at(path.align.token), rows.at(path.align.written)
    there = (asked >= 0) & (written >= 0)
    ids = (rows.whole if rows.others is None else rows.others)[np.where(there, asked, 0)]
    z, limit = rows.logits.astype(np.float64), rows.noise.reshape(len(rows.noise), -1)
    if path.logits:
        z, limit = round_interval(z, np.broadcast_to(limit, z.shape), path.logits)
    if path.penalises:
        z = _penalised(path, rows, z)
    z, limit = z / path.temperature, limit / path.temperature
    size = np.abs(_taken(z, ids))
    value, limit, of_sum = _log_softmax(path, z, limit, ids, edges)
    possible = np.isfinite(value)
    own = rows.roundings * _U32
    limit = limit + own * (np.abs(value) + size + 8) + rows.sums * of_sum
    limit = np.where(possible, limit, 0.0)
    if path.logprobs:
        value, limit = round_interval(value, limit, path.logprobs)
        limit = limit + own * np.abs(value)
    value[~there] = np.nan
    logged = np.where(there, rows.logged[np.where(there, written, 0)], np.nan)
    return Predicted(value, limit, logged, np.full(len(value), digits))


def _taken(x: Float[np.ndarray, "T V"], ids: Int[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    return np.take_along_axis(x, ids[:, None], 1)[:, 0]


def _penalised(path: Path, rows: Rows, z: Float[np.ndarray, "T V"]) -> Float[np.ndarray, "T V"]:
    """As `sample_tokens` defines it, in float64: repetition, then presence and frequency."""
    out = z.copy()
    for row, position in enumerate(rows.positions):
        if path.repetition_penalty != 1:
            seen = rows.whole[: position + 1]  # who came twice is written twice, the same
            x = z[row, seen]
            x = np.where(x > 0, x / path.repetition_penalty, x * path.repetition_penalty)
            out[row, seen] = x
        if path.presence_penalty or path.frequency_penalty:
            made, times = np.unique(rows.whole[rows.prompt : position + 1], return_counts=True)
            out[row, made] -= path.presence_penalty + path.frequency_penalty * times
    return out


def _log_softmax(
    path: Path,
    z: Float[np.ndarray, "T V"],
    limit: Float[np.ndarray, "T #V"],
    ids: Int[np.ndarray, "T"],
    edges: bool,
) -> tuple[Float[np.ndarray, "T"], Float[np.ndarray, "T"], Float[np.ndarray, "T"] | float]:
    """Of the tokens asked for, how far it may be off, and how far by the sum in it.

    An error d_v of the logits makes one of d_t - sum_v p_v d_v in ln p_t, which is
    (1 - p_t) (d_t - the mean of the others): with one size of error for all tokens that is
    1 - p_t times it, twice. Where each has its own (of rounded logits, or derived), it is the most
    that these can do.
    """
    top = z.max(axis=-1, keepdims=True)
    if path.softmax:
        return *_stepwise(path.softmax, z - top, limit, ids), 0.0
    weights = np.exp(z - top)
    total = weights.sum(axis=-1) + path.padding * np.exp(-top[:, 0])
    raw = _taken(z, ids) - top[:, 0]
    of_sum = carried.of_sum(weights, total[:, None])[:, 0]

    # Shapes in the annotations of an inner function would be read at every call.
    def off(weights: np.ndarray, total: np.ndarray) -> np.ndarray:
        if limit.shape[1] == 1:
            return limit[:, 0] * (1 - np.exp(raw) / total)
        with np.errstate(over="ignore"):
            grown = (weights * np.exp(limit)).sum(axis=-1) + (total - weights.sum(axis=-1))
        return carried.fall(raw - np.log(total), _taken(limit, ids), grown / total)

    if not path.filters:
        return raw - np.log(total), off(weights, total), of_sum
    noise = limit.max(axis=-1)

    def mass(slack: float) -> tuple[np.ndarray, np.ndarray]:
        mask = _kept(path, z - top, weights, slack * noise)
        return mask, (weights * mask).sum(axis=-1)

    (inside, kept), (outer, wide) = mass(0.0), mass(1.0)
    value, own = raw - np.log(kept), off(weights * inside, kept)
    value[~_taken(outer, ids)] = -np.inf
    if not edges:
        return value, own, of_sum
    _, narrow = mass(-1.0)
    with np.errstate(divide="ignore"):
        edge = np.maximum(np.log(wide / kept), np.log(kept / narrow))
    return value, own + edge, of_sum


def _kept(
    path: Path,
    x: Float[np.ndarray, "T V"],
    weights: Float[np.ndarray, "T V"],
    slack: Float[np.ndarray, "T"] | float,
) -> Bool[np.ndarray, "T V"]:
    """Tokens inside top-k, top-p and min-p as `sample_tokens` has them, where logits may be off by
    `slack`: wider where it is positive."""
    slack = np.broadcast_to(slack, len(x))
    kept = np.ones(x.shape, bool)
    if path.top_k:
        kth = np.partition(x, -min(path.top_k, x.shape[1]), axis=-1)[:, -path.top_k :].min(axis=-1)
        kept &= x >= (kth - np.maximum(slack, 0))[:, None]
    if path.top_p < 1:
        # An error of the logits moves a tail q by q (1 - q) times it at most.
        tail = (1 - path.top_p) * (1 - path.top_p * np.clip(2 * slack, -1, 1))
        kept &= _nucleus(np.where(kept, x, -np.inf), weights * kept, tail)
    if path.min_p:
        kept &= x >= np.log(path.min_p) - np.maximum(slack, 0)[:, None]
    return kept


def _nucleus(
    x: Float[np.ndarray, "T V"], weights: Float[np.ndarray, "T V"], tail: Float[np.ndarray, "T"]
) -> Bool[np.ndarray, "T V"]:
    """All but the least likely tokens that together have no more than `tail` of the weight.

    Of equal ones those of larger ids are kept.
    """
    total = weights.sum(axis=-1)
    found = np.broadcast_to(np.arange(x.shape[1]), x.shape)
    for head in HEADS:
        if head < x.shape[1]:
            first = np.sort(np.argpartition(x, -head, axis=-1)[:, -head:], axis=-1)
            if (np.take_along_axis(weights, first, 1).sum(axis=-1) >= total * (1 - tail)).all():
                found = first
                break
    order = np.argsort(np.take_along_axis(x, found, 1), axis=-1, kind="stable")[:, ::-1]
    found = np.take_along_axis(found, order, 1)
    each = np.take_along_axis(weights, found, 1)
    kept = each.cumsum(axis=-1) - each < (total * (1 - tail))[:, None]
    kept[:, 0] = True
    inside = np.zeros(x.shape, bool)
    np.put_along_axis(inside, found, kept, 1)
    return inside


def _stepwise(
    dtype: str,
    x: Float[np.ndarray, "T V"],
    limit: Float[np.ndarray, "T #V"],
    ids: Int[np.ndarray, "T"],
) -> tuple[Float[np.ndarray, "T"], Float[np.ndarray, "T"]]:
    """Each result rounded as jax.nn.log_softmax of such an array does, the sum taken in float32.

    Rounding is monotonic, so the ends of what goes in give the ends of what comes out.
    """
    middle, width = round_interval(x, np.broadcast_to(limit, x.shape), dtype)

    def rounded(v: np.ndarray) -> np.ndarray:
        return round_to(v, dtype, np)

    def normaliser(shifted: np.ndarray, of_sum: float) -> np.ndarray:
        total = rounded(np.exp(shifted)).sum(axis=-1)
        return rounded(np.log(rounded(total * (1 + of_sum))))

    own, off = _taken(middle, ids), _taken(width, ids)
    sums = _U32 * x.shape[1] ** 0.5
    value = rounded(own - normaliser(middle, 0.0))
    low = rounded(own - off - normaliser(middle + width, sums))
    high = rounded(own + off - normaliser(middle - width, -sums))
    return value, np.maximum(high - value, value - low)
