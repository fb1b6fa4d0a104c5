"""Two traces tensor by tensor: how far they are apart, and which operation is to blame.

A tensor's distance from the reference holds what it inherited. The verdict is therefore the local
replay's (`replay`): the operation's own error against the bound of its arithmetic.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Shaped

from qwen_jax.accuracy import spread
from qwen_jax.accuracy.exact.replay import Finding, check_same_model
from qwen_jax.accuracy.exact.rounding import UNIT
from qwen_jax.accuracy.measures.metrics import LogitMetrics, Metrics, logit_metrics, metrics
from qwen_jax.accuracy.traces.trace import AXES, Header, Trace, split_name
from qwen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor.

    Attributes:
        layer: None outside of the layers.
        metrics: its distance from the reference, with what it inherited.
        own: its operation's own error, where it was replayed.
    """

    name: str
    layer: int | None
    operation: str
    metrics: Metrics
    own: Finding | None = None

    @property
    def verdict(self) -> str:
        """ "within rounding", "fault", or "not judged" where nothing was replayed."""
        if self.own is not None:
            return "fault" if self.own.faulty else "within rounding"
        return "not judged" if self.metrics.first_bad is None else "fault"


@dataclasses.dataclass(frozen=True)
class First:
    """Where the candidate first leaves the bound."""

    name: str
    layer: int | None
    position: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All tensors that both traces hold, in the order of computation.

    Attributes:
        start: the first position compared, of the text.
        logits: KL and agreement, where both have logits.
        missing: tensors that only one of them has.
        by_position: of each tensor, the RMS error of each position over the reference's RMS.
        by_head: the same of each position and head, `[T, heads]`, of tensors that have heads.
    """

    candidate: Header
    reference: Header
    start: int
    rows: tuple[Row, ...]
    logits: LogitMetrics | None
    missing: tuple[str, ...]
    by_position: Mapping[str, Float[np.ndarray, "T"]]
    by_head: Mapping[str, Float[np.ndarray, "T heads"]]

    @property
    def first(self) -> First | None:
        """The first tensor with a fault of its own, and its first wrong position."""
        for row in self.rows:
            if row.verdict == "fault":
                if row.own is not None:
                    return First(row.name, row.layer, row.own.position)
                assert row.metrics.first_bad is not None
                return First(row.name, row.layer, self.start + row.metrics.first_bad[0])
        return None


def compare(candidate: Trace, reference: Trace, findings: Sequence[Finding] = ()) -> Comparison:
    """Compares what two traces of one text have in common: tensors and positions.

    Args:
        findings: the candidate's replayed operations.

    Raises:
        UserError: the traces are of other models or texts, or have nothing in common; the reference
            is not finite, or less exact than the candidate.
    """
    mine, theirs = candidate.header, reference.header
    start, stop = check_alike(mine, theirs)
    shared = [name for name in candidate.tensors if name in reference.tensors]
    if not shared:
        raise UserError(
            f"{mine.implementation} and {theirs.implementation} recorded no tensor in common; "
            "record both alike."
        )
    _check_dtypes(mine, theirs)
    own = {finding.name: finding for finding in findings}
    heads = mine.model_config.num_heads

    def cut(name: str, trace: Trace) -> np.ndarray:
        operation, skip = split_name(name)[1], start - trace.header.start
        return _cut(trace.tensors[name], operation, skip, stop - start, stop)

    def compared(name: str) -> tuple[Row, np.ndarray, np.ndarray | None]:
        layer, operation = split_name(name)
        ours, right = cut(name, candidate), cut(name, reference)
        row = Row(name, layer, operation, metrics(ours, right), own.get(name))
        return row, *_profiles(ours, right, operation, heads)

    _check_finite({name: cut(name, reference) for name in shared}, start)
    # The largest first: whoever takes it last would be waited for.
    order = sorted(shared, key=lambda name: -candidate.tensors[name].size)
    found = dict(zip(order, spread.each(compared, order), strict=True))
    rows, errors, of_heads = zip(*(found[name] for name in shared), strict=True)
    logits = None
    if "logits" in shared:
        logits = logit_metrics(cut("logits", candidate), cut("logits", reference))
    missing = tuple(sorted(candidate.tensors.keys() ^ reference.tensors.keys()))
    by_position = dict(zip(shared, errors, strict=True))
    by_head = {n: e for n, e in zip(shared, of_heads, strict=True) if e is not None}
    return Comparison(mine, theirs, start, rows, logits, missing, by_position, by_head)


def check_alike(mine: Header, theirs: Header) -> tuple[int, int]:
    """The positions in common of two traces, the last excluded.

    Raises UserError where they are of other models or texts, or there are none.
    """
    check_same_model(mine.model_config, theirs.model_config)
    start, stop = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
    if start >= stop:
        raise UserError(
            f"The traces have no position in common: {mine.implementation} recorded positions "
            f"{mine.start} to {mine.stop}, {theirs.implementation} {theirs.start} to "
            f"{theirs.stop}; record both alike."
        )
    pairs = zip(mine.tokens[:stop], theirs.tokens[:stop], strict=True)
    for position, (a, b) in enumerate(pairs):
        if a != b:
            raise UserError(
                f"The traces are of different texts: token {position} is {a} in "
                f"{mine.implementation} and {b} in {theirs.implementation}; give both the same ids."
            )
    return start, stop


def _check_dtypes(mine: Header, theirs: Header) -> None:
    for field in ("dtype", "activation_dtype"):
        own, other = getattr(mine, field), getattr(theirs, field)
        if UNIT[other] > UNIT[own]:
            raise UserError(
                f"The reference's {field} {other} is less exact than the candidate's {own}: their "
                "difference would tell of the reference; choose one that is at least as exact."
            )


def _check_finite(reference: Mapping[str, Shaped[np.ndarray, "T ..."]], start: int) -> None:
    """Of all tensors, in the order of computation."""
    places = spread.each(lambda pair: not_finite(*pair, start), reference.items())
    for (name, right), place in zip(reference.items(), places, strict=True):
        if place:
            raise UserError(
                f"The reference's {name} is {right[place]} at {place}, from which nothing can be "
                "told; choose a reference that is finite, as float64 is."
            )


def not_finite(
    name: str, tensor: Shaped[np.ndarray, "T ..."], start: int
) -> tuple[int, ...] | None:
    """Where a tensor, recorded from position `start` on, is not finite first, if it is anywhere;
    -inf is what scores of later positions are."""
    bad = ~np.isfinite(tensor)
    if bad.any() and split_name(name)[1] == "attn_scores":
        later = np.arange(tensor.shape[-1]) > start + np.arange(len(tensor))[:, None, None]
        bad &= ~(later & np.isneginf(tensor))
    return tuple(int(i) for i in np.argwhere(bad)[0]) if bad.any() else None


def _cut(tensor: np.ndarray, operation: str, skip: int, rows: int, keys: int) -> np.ndarray:
    """The rows in common; of scores and probabilities the keys as well."""
    part = tensor[skip : skip + rows]
    return part[..., :keys] if AXES[operation].endswith("S") else part


def _profiles(
    candidate: np.ndarray, reference: np.ndarray, operation: str, heads: int
) -> tuple[Float[np.ndarray, "T"], Float[np.ndarray, "T heads"] | None]:
    """RMS errors by position, and by position and head, over the RMS of the whole reference.

    A non-finite value that should be finite makes its position and head infinite.
    """
    with np.errstate(invalid="ignore"):
        error = candidate.astype(np.float64) - reference
    error = np.where(candidate == reference, 0, error)
    error = np.where(np.isfinite(error), error, np.inf)
    right = np.where(np.isfinite(reference), reference, 0).astype(np.float64)
    size = float(np.sqrt(np.mean(right**2))) or 1.0
    axes = AXES[operation]
    if "N" not in axes and "K" not in axes:
        return _rms(error) / size, None
    count = error.shape[1] if error.ndim == 3 else heads
    return _rms(error) / size, _rms(error.reshape(len(error), count, -1), 2) / size


def _rms(x: np.ndarray, axes: int = 1) -> np.ndarray:
    """Over all but the first axes."""
    return np.sqrt(np.mean(x.reshape(*x.shape[:axes], -1) ** 2, axis=-1))
