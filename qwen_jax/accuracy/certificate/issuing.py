"""Every engine against float64 by local replay, and one verdict on all of them.

Whoever is within the bounds of the arithmetic that it declares computes nothing but that
arithmetic, so the difference of two such engines is their roundings' (docs/certificate.md).
"""

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from qwen_jax.accuracy.certificate.contents import (
    ASSUMPTIONS,
    ASSUMPTIONS_OF_LOGS,
    VERSION,
    Certificate,
    Difference,
    Engine,
    Judged,
    LogDifference,
    Named,
    NotCovered,
    overall,
)
from qwen_jax.accuracy.certificate.inputs import inputs_of
from qwen_jax.accuracy.certificate.logs import is_log, judged_logs
from qwen_jax.accuracy.exact.operations import full_name, input_names, schedule
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.exact.replay import Finding, Replayed
from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.measures.metrics import logit_metrics
from qwen_jax.accuracy.tensors.comparison import check_alike, not_finite
from qwen_jax.accuracy.tensors.diagnosis import Cause, diagnose
from qwen_jax.accuracy.traces.foreign import dump_of, open_trace
from qwen_jax.accuracy.traces.trace import Header, Trace, split_name
from qwen_jax.errors import UserError
from qwen_jax.versions import version
from qwen_jax.weights.loader import Checkpoint


def issue(
    checkpoint: Checkpoint,
    dumps: Sequence[str],
    *,
    model: str,
    adapters: Sequence[str] = (),
    tokens: Sequence[int] | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """A certificate of one engine, or of two of one text.

    Args:
        dumps: traces or other engines' dumps; or logs.
        model, adapters: what their user calls them.
        tokens: ids of the text, where a dump doesn't say them.
        dtype: in which an engine computed whose log doesn't say it.
        progress: hears of operations done and in all, or of texts.

    Raises:
        UserError: a file can't be read, the engines computed other models or texts, nothing can be
            judged, or a tensor that nothing else is wrong with is not finite.
    """
    of_logs, *other = (is_log(dump) for dump in dumps)
    if (not of_logs) in other:
        raise UserError(f"{' and '.join(dumps)}: a log can't be certified beside a dump.")
    if of_logs and tokens is not None:
        raise UserError("tokens are given, but a log names its own; leave them out.")
    if not of_logs and dtype is not None:
        raise UserError(f"dtype is {dtype!r}, but a dump says its own; leave it out.")
    paths = [Path(dump) if of_logs else dump_of(dump) for dump in dumps]
    traces = (
        [] if of_logs else [open_trace(path, checkpoint.config, tokens=tokens) for path in paths]
    )
    inputs = inputs_of(checkpoint, paths)
    difference: Difference | LogDifference | None
    if of_logs:
        engines, difference = judged_logs(dumps, checkpoint, dtype, progress)
    else:
        engines = _judged_dumps(dumps, traces, checkpoint, progress)
        difference = _difference(*traces) if len(traces) == 2 else None
    checkpoint.check_unchanged()
    return Certificate(
        version=VERSION,
        of="logs" if of_logs else "dumps",
        verdict=overall(engines),
        engines=engines,
        difference=difference,
        model=model,
        adapters=tuple(adapters),
        tokens=None if tokens is None else tuple(tokens),
        dtype=dtype,
        inputs=inputs,
        assumptions=ASSUMPTIONS_OF_LOGS if of_logs else ASSUMPTIONS,
        versions=versions(),
    )


def _judged_dumps(
    dumps: Sequence[str],
    traces: Sequence[Trace],
    checkpoint: Checkpoint,
    progress: Progress | None,
) -> tuple[Engine, ...]:
    operations = len(schedule(checkpoint.config))
    engines = []
    for number, (dump, trace) in enumerate(zip(dumps, traces, strict=True)):

        def counted(done: int, total: int, before: int = number * operations) -> None:
            if progress:
                progress(before + done, len(dumps) * operations)

        engines.append(_judged(dump, trace, checkpoint, counted))
    return tuple(engines)


def versions() -> dict[str, str]:
    """Of what computes a certificate."""
    packages = {name: version(name) for name in ("qwen_jax", "numpy", "ml_dtypes")}
    return packages | {"python": platform.python_version()}


def _judged(dump: str, trace: Trace, checkpoint: Checkpoint, progress: Progress) -> Engine:
    header = trace.header
    vague: dict[str, str] = {}

    def heard(replayed: Replayed) -> None:
        if too_wide := _too_wide(replayed):
            vague[replayed.finding.name] = too_wide

    source = CheckpointSource(checkpoint, header.dtype)
    found = diagnose(trace, source, progress, heard)
    skipped = found.skipped | vague
    judged = {f.name: _of_finding(f, trace) for f in found.findings if f.name not in vague}
    if not judged:
        name, why = next(iter(skipped.items()))
        raise UserError(
            f"{dump}: nothing in it can be judged: {name} {why}; dump what it is computed from, "
            "too."
        )
    if not found.faulty:
        _check_finite(dump, trace)
    return Engine(
        dump=dump,
        tokens=header.tokens,
        declared=_declared(header),
        values=sum(one.values for one in judged.values()),
        largest=max(judged.values(), key=lambda one: one.fraction),
        coarsest=max(judged.values(), key=lambda one: one.resolution),
        first=None if found.first is None else judged[found.first.name],
        causes=tuple(map(_named, found.causes)),
        unexplained=tuple(judged[one.finding.name] for one in found.unknown),
        not_covered=_not_covered(trace, judged, skipped),
        tensors=tuple(judged.values()),
        not_told={},
    )


def _too_wide(replayed: Replayed) -> str:
    """Why a bound judges nothing: what should be there could be missing, and be within it.

    What is past even such a bound is wrong all the same.
    """
    finding = replayed.finding
    if finding.faulty:
        return ""
    if finding.resolution >= 1:
        return f"has a bound {finding.resolution:.2g} times as large as itself"
    if part := replayed.hidden_part():
        name, times = part
        return f"has a bound {times:.2g} times as large as what {name} changes in it"
    return ""


def _of_finding(finding: Finding, trace: Trace) -> Judged:
    tensor = trace.tensors[finding.name]
    return Judged(
        tensor=finding.name,
        layer=finding.layer,
        position=finding.position,
        fraction=finding.residual.ratio,
        resolution=finding.resolution,
        together=finding.span if len(finding.span) > 1 else (),
        values=tensor.size,
        dtype=tensor.dtype.name,
    )


def _named(cause: Cause) -> Named:
    return Named(
        name=cause.fault.name,
        line=cause.fault.line,
        operations=cause.operations,
        layers=cause.layers,
        before=cause.before.ratio,
        after=cause.after.ratio,
        together=cause.together,
        ties=cause.ties,
        against=cause.against,
    )


def _check_finite(dump: str, trace: Trace) -> None:
    """NaN follows from NaN without an error, so replay alone would let a lost engine pass."""
    for name, tensor in trace.tensors.items():
        if place := not_finite(name, tensor, trace.header.start):
            raise UserError(
                f"{dump}: {name} is {tensor[place]} at {place}, which has no bound; leave the "
                "tensor out, and the certificate says that it is not covered."
            )


def _declared(header: Header) -> dict:
    return {
        "implementation": header.implementation,
        "device": header.device,
        "versions": header.versions,
        "dtype": header.dtype,
        "activation_dtype": header.activation_dtype,
        "cache_dtype": header.cache_dtype or header.activation_dtype,
        "scores_dtype": header.scores_dtype or "float32",
        "operands": header.operands,
        "matmul_precision": header.matmul_precision,
        "chunks": header.chunks,
    }


def _not_covered(trace: Trace, judged: Iterable[str], skipped: dict[str, str]) -> NotCovered:
    header, config = trace.header, trace.header.model_config
    covered, waiting = set(), list(judged)
    while waiting:  # what was judged, and what was computed through on the way to it
        name = waiting.pop()
        if name not in covered:
            covered.add(name)
            layer, operation = split_name(name)
            inputs = input_names(operation, layer, config)
            waiting += [name for name in inputs if name not in trace.tensors]
    every = (full_name(operation, layer) for layer, operation in schedule(config))
    outside = ((0, header.start), (header.stop, len(header.tokens)))
    return NotCovered(
        operations=tuple(name for name in every if name not in covered),
        positions=tuple((a, b) for a, b in outside if a < b),
        tensors=dict(skipped),
    )


def _difference(first: Trace, second: Trace) -> Difference | None:
    """Raises UserError where they are of other texts, or have no position in common."""
    start, stop = check_alike(first.header, second.header)
    if not ("logits" in first.tensors and "logits" in second.tensors):
        return None
    a, b = (
        trace.tensors["logits"][start - trace.header.start : stop - trace.header.start]
        for trace in (first, second)
    )
    shared = logit_metrics(a, b)
    return Difference(
        positions=(start, stop),
        largest=float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()),
        mean_kld=shared.mean_kld,
        max_kld=shared.max_kld,
        same_top=shared.top1,
    )
