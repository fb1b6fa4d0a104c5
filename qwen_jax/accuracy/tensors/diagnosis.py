"""From wrong tensors to causes: a fault is named only where planting it gives the same tensor.

Every faulty operation is computed again with each fault of the catalogue that can touch it, from
the candidate's own inputs, then with pairs and triples of them. What brings every element within
its bound explains the operation; among explanations the smallest is taken, then the one that
agrees with the layer's other operations, then the one that explains most of the model's, then the
one that leaves the smallest error.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from qwen_jax.accuracy.exact.bounds import bounded
from qwen_jax.accuracy.exact.parameters import Source
from qwen_jax.accuracy.exact.replay import Finding, Replay, Replayed, Residual, compare
from qwen_jax.accuracy.exact.rounding import UNIT, round_interval, round_to
from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.measures.error_shape import ErrorShape, describe
from qwen_jax.accuracy.tensors.faults.catalogue import FAULTS
from qwen_jax.accuracy.tensors.faults.fault import Change, Fault, Overlay
from qwen_jax.accuracy.traces.trace import Trace
from qwen_jax.config import ModelConfig

MOST = 3
"""Faults of one operation that are tried together."""

SETS = 1200
"""Sets of faults of one size that are tried at most: a long span has too many triples."""

Set = tuple[str, ...]
"""Names of faults that together explain an operation, in the catalogue's order."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Faults that reproduce one tensor.

    Attributes:
        after: what is left of the error with the faults planted.
        against: operations of the layer that the faults should show in, and don't.
    """

    faults: Set
    after: Residual
    against: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Explained:
    """A faulty operation, the explanation chosen, and the others that fit equally well."""

    finding: Finding
    best: Explanation
    ties: tuple[Explanation, ...]


@dataclasses.dataclass(frozen=True)
class Cause:
    """A fault, with the operations and layers it explains.

    Attributes:
        layers: None stands for the operations outside of the layers.
        before: the largest own error of these operations,
        after: and the largest that is left with the fault, and those that are there `together`
            with it, planted.
        ties: what explains the same tensors as well.
        against: operations of these layers that the fault should show in, and doesn't.
    """

    fault: Fault
    operations: tuple[str, ...]
    layers: tuple[int | None, ...]
    before: Residual
    after: Residual
    together: Set
    ties: tuple[Set, ...]
    against: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A faulty operation that nothing in the catalogue explains."""

    finding: Finding
    shape: ErrorShape


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """All that replay and catalogue have to say of a trace.

    Attributes:
        findings: of every operation replayed, in the order of computation.
        skipped: recorded tensors that could not be judged, and why.
    """

    findings: tuple[Finding, ...]
    causes: tuple[Cause, ...]
    unknown: tuple[Unknown, ...]
    skipped: dict[str, str]

    @property
    def faulty(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.faulty)

    @property
    def first(self) -> Finding | None:
        """The first wrong tensor."""
        return next(iter(self.faulty), None)

    @property
    def named(self) -> Set:
        """The faults found, by name."""
        return tuple(cause.fault.name for cause in self.causes)


def diagnose(
    trace: Trace,
    source: Source,
    progress: Progress | None = None,
    heard: Callable[[Replayed], None] | None = None,
) -> Diagnosis:
    """Finds every operation that is wrong in itself, and names why.

    Args:
        trace: of the candidate; any subset of the tensors.
        source: the right parameters, rounded as the candidate holds them
            (`CheckpointSource(path, trace.header.dtype)`).
        progress: hears of operations done and in all,
        heard: and of each that was judged.

    Raises:
        UserError: trace and parameters belong to models of different sizes.
    """
    replay = Replay(trace, source)
    findings: list[Finding] = []
    explained: list[Explained] = []
    unknown: list[Unknown] = []
    known: list[Set] = []

    def counted() -> Iterator[Replayed]:
        for done, replayed in enumerate(replay, 1):
            if progress:
                progress(done, len(replay))
            if heard:
                heard(replayed)
            yield replayed

    def part(replayed: Replayed) -> tuple[int | None, bool]:
        """The layer; what comes before all layers and after them are two parts."""
        return replayed.finding.layer, replayed.finding.operation == "embed"

    for _, group in itertools.groupby(counted(), part):
        layer = list(group)
        findings += [r.finding for r in layer]
        # Where an operation of an earlier layer defied every set of faults, as all do under a
        # wrong mapping, only single ones are tried: pairs would take minutes.
        hopeless = {u.finding.operation for u in unknown}
        for one in _explain_layer(layer, known, hopeless):
            if isinstance(one, Unknown):
                unknown.append(one)
                continue
            explained.append(one)
            for e in (one.best, *one.ties):
                if e.faults not in known:
                    known.append(e.faults)
    causes = _causes(list(_agreed(explained)))
    return Diagnosis(tuple(findings), causes, tuple(unknown), replay.skipped)


def _explain_layer(
    layer: Sequence[Replayed],
    known: Sequence[Set],
    hopeless: Collection[str],
) -> Iterator[Explained | Unknown]:
    fits = {}
    for r in layer:
        if r.finding.faulty:
            most = 1 if r.finding.operation in hopeless else MOST
            fits[r.finding.operation] = _explanations(r, known, most)
    covered = {
        name: sum(any(name in e.faults for e in found) for found in fits.values())
        for name in {n for found in fits.values() for e in found for n in e.faults}
    }
    sound = [r for r in layer if not r.finding.faulty]
    against = {name: _contradicted(name, sound) for name in covered}
    for replayed in layer:
        if not replayed.finding.faulty:
            continue
        found = [
            dataclasses.replace(e, against=tuple(o for n in e.faults for o in against[n]))
            for e in fits[replayed.finding.operation]
        ]
        if not found:
            shape = describe(replayed.candidate, replayed.expected, replayed.bound)
            yield Unknown(replayed.finding, shape)
            continue
        best = min(found, key=lambda e: (bool(e.against), -sum(covered[n] for n in e.faults)))
        ties = tuple(e for e in found if e is not best and bool(e.against) == bool(best.against))
        yield Explained(replayed.finding, best, ties)


def _explanations(replayed: Replayed, known: Sequence[Set], most: int) -> list[Explanation]:
    """The smallest sets of at most so many faults that reproduce the tensor, all of one size."""
    config = replayed.ctx.config
    able = [
        fault
        for fault in FAULTS.values()
        if set(replayed.finding.span) & set(fault.operations) and fault.possible(config)
    ]
    for size in range(1, most + 1):
        if math.comb(len(able), size) > SETS:
            break
        # What explained an earlier layer is tried first: it spares the search of all sets.
        earlier = [tuple(FAULTS[n] for n in s) for s in known if len(s) == size]
        sets: Sequence[tuple[Fault, ...]] = [s for s in earlier if set(s) <= set(able)]
        found: list[Explanation] = []
        for pool in (sets if size > 1 else [], itertools.combinations(able, size)):
            if found:
                break
            for faults in pool:
                if _collide(faults, config, replayed.finding.span):
                    continue
                if after := fit(replayed, faults):
                    found.append(Explanation(tuple(f.name for f in faults), after))
        if found:
            return found
    return []


def _collide(faults: Sequence[Fault], config: ModelConfig, span: Sequence[str]) -> bool:
    """Whether one of them turns what another one has turned: fewer would do the same."""
    turned = [
        (key, frozenset(fault.operations).intersection(span))
        for fault in faults
        for key in {key for change in fault.knobs(config)[:1] for key in change}
    ]
    return len(turned) > len(set(turned))


def _contradicted(name: str, sound: Sequence[Replayed]) -> tuple[str, ...]:
    """Sound operations that would not be, were the fault there."""
    fault = FAULTS[name]
    return tuple(
        r.finding.operation
        for r in sound
        if set(r.finding.span) & set(fault.operations) and not fit(r, (fault,))
    )


def fit(replayed: Replayed, faults: Sequence[Fault]) -> Residual | None:
    """What is left of a tensor's error with faults planted, in the first of their variants that
    leave no more than rounding; None where none does."""
    config = replayed.ctx.config
    sample = replayed if any(fault.slots for fault in faults) else replayed.sample()
    for changes in itertools.product(*(fault.knobs(config) or ({},) for fault in faults)):
        planted = list(zip(faults, changes, strict=True))
        if sample is not replayed and not _left(sample, planted).within:
            continue
        after = _left(replayed, planted)
        if after.within:
            return after
    return None


def _left(replayed: Replayed, faults: Sequence[tuple[Fault, Change]]) -> Residual:
    """Of a tensor's error with faults planted: every step of its span is computed again."""
    values, arithmetic = dict(replayed.base), replayed.arithmetic
    for step in replayed.steps:
        name, weights = step.operation, step.weights
        turned: Change = {}
        for fault, change in faults:
            if name in fault.operations:
                turned |= change
                weights = Overlay(weights, fault) if fault.parameters else weights
        product = turned.get("product")
        if product and UNIT[product] <= arithmetic.unit(name):
            del turned["product"]  # nothing that the engine's own rounding does not do
        output = turned.pop("output", None)
        ctx = replayed.ctx.turned(**turned)
        params = weights[name]  # in float64 once for all that are tried
        inputs = [values[n] for n in step.inputs]
        value, limit = bounded(name, ctx, arithmetic.at(step.name), inputs, params)
        if output and UNIT[output] > arithmetic.unit(name):
            value, limit = round_interval(value, limit, output)
        elif output:
            # It is rounded to something coarser anyway: only what overflows tells them apart.
            overflown = round_to(value, output, np)
            value = np.where(np.isinf(overflown), overflown, value)
        values[step.name] = value, limit
    return compare(replayed.candidate, value, limit)


def _agreed(explained: Sequence[Explained]) -> Iterator[Explained]:
    """Each with the explanation that explains most operations of the model, and leaves least."""
    covered: Counter[str] = Counter()
    left: dict[Set, float] = {}
    for one in explained:
        fitting = (one.best, *one.ties)
        covered.update({name for e in fitting for name in e.faults})
        for e in fitting:
            left[e.faults] = left.get(e.faults, 0.0) + e.after.relative
    for one in explained:
        fitting = (one.best, *one.ties)
        best, *ties = sorted(
            fitting, key=lambda e: (-sum(covered[n] for n in e.faults), left[e.faults])
        )
        yield dataclasses.replace(one, best=best, ties=tuple(ties))


def _causes(explained: Sequence[Explained]) -> tuple[Cause, ...]:
    """One cause for each fault, in the order of discovery."""
    by_fault: dict[str, list[Explained]] = {}
    for one in explained:
        for name in one.best.faults:
            by_fault.setdefault(name, []).append(one)
    return tuple(_cause(name, found) for name, found in by_fault.items())


def _cause(name: str, found: Sequence[Explained]) -> Cause:
    def worst(residuals: Sequence[Residual]) -> Residual:
        return max(residuals, key=lambda r: r.ratio)

    def unique(items: Callable[[Explained], Sequence]) -> tuple:
        return tuple(dict.fromkeys(item for one in found for item in items(one)))

    def instead(one: Explained) -> list[Set]:
        """What could stand for this fault, beside the others that the operation has."""
        others = {n for n in one.best.faults if n != name}
        ties = [t.faults for t in one.ties if others.issubset(t.faults)]
        return [tuple(n for n in faults if n not in others) for faults in ties]

    shared = set.intersection(*(set(instead(one)) for one in found))
    return Cause(
        fault=FAULTS[name],
        operations=unique(lambda e: (e.finding.operation,)),
        layers=unique(lambda e: (e.finding.layer,)),
        before=worst([one.finding.residual for one in found]),
        after=worst([one.best.after for one in found]),
        together=unique(lambda e: [n for n in e.best.faults if n != name]),
        ties=tuple(faults for faults in unique(instead) if faults in shared),
        against=unique(lambda e: e.best.against),
    )


def possible_faults(config: ModelConfig) -> list[Fault]:
    """The faults of the catalogue that a model of this config can have."""
    return [fault for fault in FAULTS.values() if fault.possible(config)]
