"""What a report is made of, and the numbers that gates are held against."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qwen_jax.accuracy.cache.audit import CacheFinding
from qwen_jax.accuracy.compiler import Probe
from qwen_jax.accuracy.distribution.comparison import Distribution
from qwen_jax.accuracy.exact.replay import Finding
from qwen_jax.accuracy.finding import Audited, wrong
from qwen_jax.accuracy.gates import Outcome
from qwen_jax.accuracy.inside.judging import InsideFinding
from qwen_jax.accuracy.logprobs.audit import LogprobsReport
from qwen_jax.accuracy.machine import MachineFinding
from qwen_jax.accuracy.quantisation.costs import Quantisation
from qwen_jax.accuracy.tensors.comparison import Comparison
from qwen_jax.accuracy.tensors.diagnosis import Diagnosis
from qwen_jax.accuracy.tensors.precision_search import PrecisionSearch
from qwen_jax.accuracy.text.audit import TextFinding
from qwen_jax.accuracy.traces.trace import Header
from qwen_jax.accuracy.weights.audit import WeightFinding
from qwen_jax.reporting.origin import Origin


@dataclasses.dataclass(frozen=True)
class Report:
    """Whatever of the laboratory was run; what is None was not.

    Attributes:
        candidate: of the trace, where one was recorded.
        notes: what a reader should know besides.
        planted: faults that were planted on purpose, by name.
        compiler: what was found of the compiler under all of it.
        model: what it is, in names and values.
        origin: command, versions, commit and date.
    """

    candidate: Header | None = None
    comparison: Comparison | None = None
    diagnosis: Diagnosis | None = None
    weights: Sequence[WeightFinding] | None = None
    text: Sequence[TextFinding] | None = None
    cache: Sequence[CacheFinding] | None = None
    distribution: Distribution | None = None
    precision: PrecisionSearch | None = None
    machine: Sequence[MachineFinding] | None = None
    inside: Sequence[InsideFinding] | None = None
    logprobs: LogprobsReport | None = None
    quantisation: Quantisation | None = None
    gates: tuple[Outcome, ...] = ()
    planted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    compiler: Probe | None = None
    model: Mapping[str, str] = dataclasses.field(default_factory=dict)
    origin: Origin | None = None

    @property
    def header(self) -> Header | None:
        return self.candidate or (self.comparison.candidate if self.comparison else None)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every replayed operation, in the order of computation."""
        if self.diagnosis is not None:
            return self.diagnosis.findings
        rows = self.comparison.rows if self.comparison else ()
        return tuple(row.own for row in rows if row.own is not None)


def values(report: Report) -> dict[str, float]:
    """Everything measured that a gate can be set on: see `gates.METRICS`."""
    return dict(_values(report))


def _values(report: Report) -> Iterator[tuple[str, float]]:
    if report.compiler:
        yield "compiler_faults", len(report.compiler.wrong)
    if report.findings:
        yield "faults", sum(f.faulty for f in report.findings)
        yield "of_bound", float(np.max([f.residual.ratio for f in report.findings]))
        if report.diagnosis:
            yield "unknown", len(report.diagnosis.unknown)
    if report.comparison:
        rows = report.comparison.rows
        yield "nans", sum(row.metrics.nans for row in rows)
        yield "infs", sum(row.metrics.infs for row in rows)
        yield from ((f"{r.name}_rms", r.metrics.rms_rel) for r in rows if r.name == "logits")
        if logits := report.comparison.logits:
            yield "topk", logits.topk
            yield "mean_kld", logits.mean_kld
            yield "max_kld", logits.max_kld
            yield "top1", logits.top1
    if d := report.distribution:
        kld = dict(d.kld_percentiles)
        yield "mean_kld", d.kld.value
        yield "max_kld", kld[100.0]
        yield "top1", d.same_top.value
        yield "kld_99_9", kld[99.9]
        yield "kld_99", kld[99.0]
        yield "kld_median", kld[50.0]
        yield "ppl", d.ppl.value
        yield "ppl_ratio", d.ratio.value
        yield "ppl_difference", d.difference.value
        yield "dp_rms", d.dp_rms.value
    audits: dict[str, Sequence[Audited] | None] = {
        "weights": report.weights,
        "text": report.text,
        "cache": report.cache,
        "machine": report.machine,
        "inside": report.inside,
    }
    for name, findings in audits.items():
        if findings is not None:
            yield f"{name}_faults", wrong(findings)
    if report.inside:
        yield "inside_of_bound", float(np.max([f.residual.ratio for f in report.inside]))
    if logs := report.logprobs:
        yield "logprob_causes", len(logs.causes)
        yield "logprob_unexplained", logs.unexplained
        if logs.figures:
            yield "kl_k1", logs.figures.k1.value
            yield "kl_k3", logs.figures.k3.value
            yield "ratio_max", logs.figures.by_token.max
            yield "ess", logs.figures.by_token.ess
    if report.quantisation:
        yield "quantisation_kld", report.quantisation.total.value
    if report.precision:
        yield "kept_float32", len(report.precision.kept)
