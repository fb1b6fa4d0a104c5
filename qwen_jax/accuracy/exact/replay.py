"""Local replay: every operation again in float64, from what the candidate itself had before it.

So an operation is judged by its own error alone, whatever it inherited, and several faulty ones
are all found. Where a trace lacks tensors in between, a span of operations is replayed at once.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qwen_jax.accuracy import spread
from qwen_jax.accuracy.exact.bounds import Arithmetic, bounded
from qwen_jax.accuracy.exact.operations import (
    Calls,
    Context,
    full_name,
    input_names,
    schedule,
)
from qwen_jax.accuracy.exact.parameters import Source, Weights
from qwen_jax.accuracy.exact.pieces import Error, cut, evaluate
from qwen_jax.accuracy.exact.rounding import UNIT
from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.traces.trace import Trace
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Residual:
    """How far a tensor is from an expectation.

    Attributes:
        ratio: the largest error over its bound; at most 1 where rounding explains all.
        relative: the RMS error over the expectation's RMS.
        worst: index of the largest ratio, position first.
    """

    ratio: float
    relative: float
    worst: tuple[int, ...]

    @property
    def within(self) -> bool:
        return self.ratio <= 1


@dataclasses.dataclass(frozen=True)
class Finding:
    """One replayed operation and its own error.

    Attributes:
        layer: None outside of the layers.
        residual: of the candidate's tensor from float64.
        position: the first position of the text past the bound, or of the largest ratio.
        span: operations replayed together, the last one this one.
        resolution: the RMS of the bound over that of the expectation; from 1 on, zeros would be
            within it.
    """

    operation: str
    layer: int | None
    residual: Residual
    position: int
    span: tuple[str, ...]
    resolution: float

    @property
    def name(self) -> str:
        return full_name(self.operation, self.layer)

    @property
    def faulty(self) -> bool:
        return not self.residual.within


class Step(NamedTuple):
    """An operation of a span; `name` is its tensor's full one."""

    name: str
    operation: str
    inputs: tuple[str, ...]
    weights: Weights


PARTS = ("o_proj", "down_proj")
"""What a layer adds to the stream: attention, and feed-forward."""

Value = tuple[Array, Error]
"""A tensor and how far it may be off."""


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What is needed to judge a tensor, and to try faults on it.

    Attributes:
        steps: the operations from recorded tensors to this one, the last one its own.
        base: the recorded tensors that they start from.
        arithmetic: the candidate's, of this tensor.
    """

    finding: Finding
    candidate: Float[np.ndarray, "..."]
    expected: Float[np.ndarray, "..."]
    bound: Float[np.ndarray, "..."]
    ctx: Context
    steps: tuple[Step, ...]
    base: Mapping[str, Value]
    arithmetic: Arithmetic

    def hidden_part(self) -> tuple[str, float] | None:
        """Attention or feed-forward of a layer that could be left out within the bound, by the name
        of what it adds to the stream, and the RMS of the bound over that of the change it makes.

        None where there is no such part, or the bound is finer than what bfloat16 stores.
        """
        if self.finding.resolution < UNIT["bfloat16"]:
            return None
        bound = _rms(self.bound, self.expected)
        for step in self.steps[:-1]:
            if step.operation in PARTS:
                change = _rms(self.expected - self._without(step), self.expected)
                if not bound < change:
                    return step.name, bound / change if change else np.inf
        return None

    def _without(self, part: Step) -> Array:
        """What comes out where a step makes zeros."""
        values = {name: value for name, (value, _) in self.base.items()}
        for step in self.steps:
            name, inputs = step.operation, [values[n] for n in step.inputs]
            made = evaluate(name, self.ctx, inputs, step.weights.held(name))
            values[step.name] = np.zeros_like(made) if step is part else made
        return values[self.finding.name]

    def sample(self) -> "Replayed":
        """The same of its worst position alone; of all, where a step on the way to it attends.

        What explains the whole explains this, and it takes a small part of the time. Slots of a
        cache are not in it.
        """
        first, *attends = [step.operation in ("attn_scores", "attn_out") for step in self.steps]
        if any(attends) or (first and attends):
            return self
        row = slice(self.finding.residual.worst[0], self.finding.residual.worst[0] + 1)
        ctx = dataclasses.replace(self.ctx, calls=self.ctx.calls[row], tokens=self.ctx.tokens[row])
        base = {name: cut(value, row) for name, value in self.base.items()}
        if first:  # keys and values are those of every position
            other = self.steps[0].inputs[1]
            base[other] = self.base[other]
        return dataclasses.replace(
            self,
            candidate=self.candidate[row],
            expected=self.expected[row],
            bound=self.bound[row],
            ctx=ctx,
            base=base,
        )


class _Held(NamedTuple):
    """A tensor that later operations read: recorded, or computed by some steps."""

    value: Value
    steps: tuple[Step, ...]
    base: Mapping[str, Value]


def compare(
    candidate: Float[np.ndarray, "..."],
    expected: Float[np.ndarray, "..."],
    limit: Float[np.ndarray, "..."],
) -> Residual:
    """Equal infinities and two NaN agree; other non-finite values are infinitely far apart."""
    parts = spread.parts(len(candidate), candidate[:1].size)

    def compared(rows: slice) -> tuple[float, int, float, float]:
        with np.errstate(all="ignore"):
            return _compared(candidate[rows], expected[rows], limit[rows])

    found = spread.each(compared, parts)
    ratios, at, errors, sizes = zip(*found, strict=True)
    ratio = max(ratios)
    part = ratios.index(ratio)
    first, *rest = np.unravel_index(at[part], candidate[parts[part]].shape)
    with np.errstate(all="ignore"):
        size = np.sqrt(sum(sizes) / candidate.size) or 1.0
        relative = np.sqrt(sum(errors) / candidate.size) / size
    worst = parts[part].start + int(first), *map(int, rest)
    return Residual(ratio, float(relative), worst)


def _compared(candidate: Array, expected: Array, limit: Array) -> tuple[float, int, float, float]:
    """Of some rows: the largest ratio, where it is, the errors' squares and the expectation's."""
    same = _same(candidate, expected)
    error = np.where(same, 0, np.abs(candidate - expected))
    error = np.where(np.isfinite(error), error, np.inf)
    # A bound that is not finite bounds nothing.
    ratio = np.where(error > 0, np.where(np.isfinite(limit), error / limit, np.inf), 0)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    finite = np.where(np.isfinite(expected), expected, 0)
    worst = int(ratio.argmax())
    squares = float(np.sum(error**2)), float(np.sum(finite**2))
    return float(ratio.flat[worst]), worst, *squares


def _same(candidate: Array, expected: Array) -> Array:
    """Where both are the same, or the candidate's NaN lies in a row with NaN of the inputs'.

    An additive mask turns the NaN of such a row's scores into NaN, another one into -inf.
    """
    inherited = np.isnan(expected).any(axis=-1, keepdims=True)
    return (candidate == expected) | (np.isnan(candidate) & inherited)


def first_position(candidate: Array, expected: Array, limit: Array) -> int:
    """The first row with an error past its bound."""
    with np.errstate(all="ignore"):
        same = _same(candidate, expected)
        wrong = ~(same | (np.abs(candidate - expected) <= limit) & np.isfinite(limit))
    return int(wrong.reshape(len(wrong), -1).any(axis=1).argmax())


def _rms(x: Array, like: Array) -> float:
    """Over what is finite in another array."""
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.mean(x[np.isfinite(like)] ** 2)))


def _resolution(expected: Array, limit: Array) -> float:
    def sums(rows: slice) -> tuple[int, float, float]:
        finite = np.isfinite(expected[rows])
        with np.errstate(all="ignore"):  # what overflows allows everything
            off, value = (np.where(finite, x[rows], 0) for x in (limit, expected))
            return int(finite.sum()), float(np.sum(off * off)), float(np.sum(value * value))

    parts = spread.parts(len(expected), expected[:1].size)
    count, allowed, size = map(sum, zip(*spread.each(sums, parts), strict=True))
    if not count or not np.isfinite(allowed):
        return np.inf
    return float(np.sqrt(allowed / count)) / (float(np.sqrt(size / count)) or 1.0)


class Replay:
    """A trace and the parameters it should have used; iterate for each tensor, in order.

    Args:
        source: the right parameters, rounded as the candidate holds them.
        arithmetic: the candidate's; what its header says by default.

    Raises:
        UserError: the parameters belong to a model of other sizes.
    """

    def __init__(self, trace: Trace, source: Source, arithmetic: Arithmetic | None = None):
        header = trace.header
        check_same_model(header.model_config, source.config)
        self.trace, self.source = trace, source
        self.config = source.config
        self.arithmetic = arithmetic or Arithmetic.of(header)
        self.rows = slice(header.start, header.stop)
        self.calls = Calls.of(header.chunks)[self.rows]
        self.tokens = np.asarray(header.tokens)[self.rows]
        self.skipped: dict[str, str] = {}
        self._held: dict[str, _Held] = {}

    def __iter__(self) -> Iterator[Replayed]:
        weights = Weights(self.source, None)
        plan = schedule(self.config)
        last_needed = {
            name: at
            for at, (layer, op) in enumerate(plan)
            for name in input_names(op, layer, self.config)
        }
        for at, (layer, name) in enumerate(plan):
            if weights.layer != layer:
                weights = Weights(self.source, layer)
            replayed = self._replay(layer, name, weights)
            if replayed is not None:
                yield replayed
            for held in [n for n in self._held if last_needed.get(n, -1) <= at]:
                del self._held[held]

    def __len__(self) -> int:
        return len(schedule(self.config))

    def _replay(self, layer: int | None, name: str, weights: Weights) -> Replayed | None:
        full, needed = full_name(name, layer), input_names(name, layer, self.config)
        recorded = self.trace.tensors.get(full)
        candidate = None if recorded is None else recorded.astype(np.float64)
        missing = [n for n in needed if n not in self._held]
        if name in ("attn_scores", "attn_out") and self.rows.start > 0:
            missing.append(f"keys and values of positions 0 to {self.rows.start - 1}")
        if missing:
            if candidate is not None:
                self.skipped[full] = f"needs {', '.join(missing)}"
                self._keep(full, candidate, 0.0)
            return None
        held = [self._held[n] for n in needed]
        ctx = Context(self.config, self.calls, self.tokens)
        arithmetic = self.arithmetic
        if recorded is not None:
            arithmetic = arithmetic.recorded(name, recorded.dtype)
        values, params = [h.value for h in held], weights.held(name)
        expected, limit = bounded(name, ctx, arithmetic.at(full), values, params)
        steps = tuple(dict.fromkeys(step for h in held for step in h.steps))
        steps = (*steps, Step(full, name, needed, weights))
        base = {n: value for h in held for n, value in h.base.items()}
        if candidate is None:
            self._held[full] = _Held((expected, limit), steps, base)
            return None
        # An engine's attention keeps no probabilities: those in a trace were computed beside
        # it, from scores rounded in another order, so both have their own error.
        beside = name in ("attn_scores", "attn_probs")
        self._keep(full, candidate, 2 * limit if beside else 0.0)
        residual = compare(candidate, expected, limit)
        row = residual.worst[0] if residual.within else first_position(candidate, expected, limit)
        span = tuple(step.operation for step in steps)
        position = row + self.rows.start
        finding = Finding(name, layer, residual, position, span, _resolution(expected, limit))
        return Replayed(finding, candidate, expected, limit, ctx, steps, base, arithmetic)

    def _keep(self, full: str, recorded: Array, error: Error) -> None:
        self._held[full] = _Held((recorded, error), (), {full: (recorded, error)})


def replay(
    trace: Trace, source: Source, progress: Progress | None = None
) -> tuple[list[Finding], dict[str, str]]:
    """Every operation's own error, and the recorded tensors that could not be judged, with why."""
    run = Replay(trace, source)
    findings = []
    for done, replayed in enumerate(run, 1):
        findings.append(replayed.finding)
        if progress:
            progress(done, len(run))
    return findings, run.skipped


def check_same_model(candidate: ModelConfig, ours: ModelConfig) -> None:
    """Raises UserError where sizes differ; constants may, since a wrong one is a fault to name."""
    sizes: Sequence[str] = (
        *("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size"),
        "vocab_size",
    )
    for field in sizes:
        theirs, right = getattr(candidate, field), getattr(ours, field)
        if theirs != right:
            raise UserError(
                f"{candidate.source}: the trace's {field} is {theirs}, but {ours.source} has "
                f"{right}; compare a trace with the checkpoint that it was made from."
            )
