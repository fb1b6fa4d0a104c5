"""A report's tables."""

from collections.abc import Iterator, Sequence

import numpy as np

from qwen_jax.accuracy.cache.audit import cache_table
from qwen_jax.accuracy.distribution.comparison import Distribution, Estimate
from qwen_jax.accuracy.exact.replay import Finding
from qwen_jax.accuracy.finding import others
from qwen_jax.accuracy.gates import Outcome
from qwen_jax.accuracy.inside.audit import inside_table
from qwen_jax.accuracy.logprobs.table import logprobs_tables
from qwen_jax.accuracy.machine import machine_table
from qwen_jax.accuracy.measures.error_shape import ranges
from qwen_jax.accuracy.quantisation.table import MOST, quantisation_tables
from qwen_jax.accuracy.report.contents import Report
from qwen_jax.accuracy.tensors.comparison import Comparison, Row
from qwen_jax.accuracy.tensors.diagnosis import Diagnosis
from qwen_jax.accuracy.tensors.precision_search import PrecisionSearch
from qwen_jax.accuracy.text.audit import text_table
from qwen_jax.accuracy.traces.trace import AXES, Header
from qwen_jax.accuracy.weights.table import weights_table
from qwen_jax.reporting.table import Table, number


def audits(report: Report, most: int | None = MOST) -> Iterator[tuple[str, list[Table]]]:
    """The parts that stand for themselves, with a title for the page; so many lines of a table that
    has one for every tensor."""
    if report.weights is not None:
        yield "Weights", [weights_table(report.weights)]
    if report.text is not None:
        yield "Text", [text_table(report.text)]
    if report.cache is not None:
        yield "Cache", [cache_table(report.cache)]
    if report.distribution:
        yield "Distribution", distribution_tables(report.distribution)
    if report.machine is not None:
        yield "Machine", [machine_table(report.machine)]
    if report.inside is not None:
        yield "Inside the decode step", [inside_table(report.inside)]
    if report.precision:
        yield "Precision", precision_tables(report.precision)
    if report.quantisation:
        yield "Quantisation", quantisation_tables(report.quantisation, most)
    if report.logprobs:
        yield "Log-probabilities", logprobs_tables(report.logprobs)


def describe(header: Header) -> str:
    dtypes = header.dtype
    if header.activation_dtype != header.dtype:
        dtypes = f"parameters {header.dtype} and activations {header.activation_dtype}"
    return f"{header.implementation}, {dtypes}, {header.device}: {header.model}"


def header_rows(report: Report) -> list[tuple[str, str]]:
    """What was held against what."""
    rows: list[tuple[str, str]] = []
    if header := report.header:
        rows.append(("candidate", describe(header)))
        if report.comparison:
            rows.append(("reference", describe(report.comparison.reference)))
        rows.append(("text", describe_text(header)))
    if report.compiler:
        rows.append(("compiler", str(report.compiler)))
    if report.planted:
        rows.append(("planted", ", ".join(report.planted)))
    return rows + [("note", note) for note in report.notes]


def describe_text(header: Header) -> str:
    several = [n for n in header.chunks if n > 1]
    single = len(header.chunks) - len(several)
    ways = [f"{sum(several)} in {len(several)} call{'s' * (len(several) > 1)}"] if several else []
    ways += [f"{single} one by one"] if single else []
    return (
        f"{len(header.tokens)} tokens, {' and '.join(ways)}; positions {header.start} to "
        f"{header.stop - 1} recorded"
    )


def layers_of(report: Report) -> int:
    return report.header.model_config.num_layers if report.header else 0


def show_layers(layers: Sequence[int | None], count: int) -> str:
    inside = [layer for layer in layers if layer is not None]
    return ranges(np.isin(np.arange(count), inside)) if inside else "-"


def cause_table(diagnosis: Diagnosis, layers: int) -> Table:
    rows: list[Sequence[str]] = []
    for cause in diagnosis.causes:
        where = show_layers(cause.layers, layers)
        what = f"{cause.fault.line}; seen in {', '.join(cause.operations)}"
        if cause.fault.faint:
            inside = "the final norm alone" if where == "-" else f"layers {where}"
            what += f"; visible in {inside}, present at least there"
        if cause.together:
            what += f"; together with {', '.join(cause.together)}"
        if cause.ties:
            what += f"; as well explained by {' or '.join(others(cause.ties))}"
        if cause.against:
            what += f"; but not seen in {', '.join(cause.against)}"
        before, after = number(cause.before.ratio), number(cause.after.ratio)
        rows.append((cause.fault.name, where, before, after, what))
    caption = "causes, with the own error over its bound as it is and once the cause is planted"
    names = ("cause", "layers", "as it is", "planted", "what and where")
    return Table(names, rows, (2, 3), caption)


def unknown_table(diagnosis: Diagnosis) -> Table:
    rows: list[Sequence[str]] = [
        (one.finding.name, number(one.finding.residual.ratio), str(one.shape))
        for one in diagnosis.unknown
    ]
    return Table(("unknown fault in", "of bound", "where"), rows, (1,))


def operation_table(comparison: Comparison) -> Table:
    """One line an operation: the layer where it is worst, and how many layers are at fault."""
    rows: list[Sequence[str]] = []
    for operation in AXES:
        group = [row for row in comparison.rows if row.operation == operation]
        if group:
            rows.append(_operation_row(operation, group))
    caption = (
        "tensors against the reference, the worst layer of each; ULPs are the median's, and 'of "
        "bound' is the operation's own error, without what it inherited"
    )
    names = ("operation", "layer", "rms error", "max error", "1 - cosine", "ULPs", "NaN+Inf")
    return Table((*names, "of bound", "verdict"), rows, range(1, 8), caption)


def _operation_row(operation: str, group: Sequence[Row]) -> tuple[str, ...]:
    worst = max(group, key=lambda row: row.metrics.rms_rel)
    m = worst.metrics
    own = [row.own for row in group if row.own is not None]
    return (
        operation,
        "-" if worst.layer is None else str(worst.layer),
        number(m.rms_rel),
        number(m.max_rel),
        number(max(1 - m.cosine, 0)),
        number(m.median_ulp),
        str(sum(row.metrics.nans + row.metrics.infs for row in group)),
        number(max(f.residual.ratio for f in own)) if own else "-",
        _verdict([row.verdict for row in group]),
    )


def tensor_table(comparison: Comparison) -> Table:
    """Every tensor, with all its metrics."""
    names = ("tensor", "max abs", "rms abs", "max rel", "rms rel", "NMSE", "1 - cosine")
    rows: list[Sequence[str]] = []
    for row in comparison.rows:
        m = row.metrics
        errors = (m.max_abs, m.rms_abs, m.max_rel, m.rms_rel, m.nmse, max(1 - m.cosine, 0))
        bound = number(row.own.residual.ratio) if row.own else "-"
        ulps = f"{number(m.max_ulp)} / {number(m.median_ulp)}"
        bad = f"{m.nans} / {m.infs}" + (f" from {m.first_bad}" if m.first_bad else "")
        rows.append((row.name, *map(number, errors), ulps, bad, bound, row.verdict))
    header = (*names, "ULPs max / median", "NaN / Inf", "of bound", "verdict")
    return Table(header, rows, range(1, 10))


def _verdict(verdicts: Sequence[str]) -> str:
    wrong = verdicts.count("fault")
    if wrong:
        return "FAULT" if len(verdicts) == 1 else f"FAULT in {wrong} of {len(verdicts)}"
    return "not judged" if "not judged" in verdicts else "ok"


def logits_line(comparison: Comparison) -> str:
    if (logits := comparison.logits) is None:
        return ""
    return (
        f"next token: KL divergence {number(logits.mean_kld)} on average, {number(logits.max_kld)} "
        f"at most; same likeliest token {logits.top1:.1%}, of the likeliest {logits.k} "
        f"{logits.topk:.1%} shared"
    )


def finding_table(findings: Sequence[Finding]) -> Table:
    """Own errors alone, where there is no reference to be far from."""
    rows: list[Sequence[str]] = []
    for operation in AXES:
        group = [f for f in findings if f.operation == operation]
        if group:
            worst = max(group, key=lambda f: f.residual.ratio)
            layer = "-" if worst.layer is None else str(worst.layer)
            verdicts = ["fault" if f.faulty else "within rounding" for f in group]
            error, ratio = number(worst.residual.relative), number(worst.residual.ratio)
            rows.append((operation, layer, error, ratio, _verdict(verdicts)))
    header = ("operation", "layer", "own error", "of bound", "verdict")
    return Table(header, rows, (1, 2, 3))


def distribution_tables(d: Distribution) -> list[Table]:
    def both(e: Estimate) -> str:
        return f"{e.value:12.6f} ± {e.error:.6f}"

    # Adding zero makes -0.000 positive.
    def percent(x: float) -> str:
        return f"{round(100 * x, 3) + 0.0:8.3f} %"

    def percents(e: Estimate) -> str:
        return f"{100 * e.value:8.3f} ± {100 * e.error:.3f} %"

    tokens = len(d.scores.kld)
    caption = f"distribution: {tokens} tokens scored, of {d.contexts} windows of {d.context}"
    top = [
        ("candidate", d.candidate),
        ("base", d.base),
    ]
    perplexity = [
        ("PPL", both(d.ppl)),
        ("PPL of the base", both(d.ppl_base)),
        ("correlation of ln PPL", f"{100 * d.correlation:12.2f} %"),
        ("ln(PPL / PPL base)", both(d.ln_ratio)),
        ("PPL / PPL base", both(d.ratio)),
        ("PPL - PPL base", both(d.difference)),
        ("same top token", f"{100 * d.same_top.value:12.3f} ± {100 * d.same_top.error:.3f} %"),
    ]
    kld = dict(d.kld_percentiles)
    rows = [("", "KL divergence", "change of the right token's probability")]
    rows.append(("mean", both(d.kld), percents(d.dp)))
    rows.append(("RMS", "", percents(d.dp_rms)))
    for at, change in d.dp_percentiles:
        name = {100.0: "maximum", 50.0: "median", 0.0: "minimum"}.get(at, f"{at:g} %")
        rows.append(
            (name, f"{round(kld[at], 6) + 0.0:12.6f}" if at in kld else "", percent(change))
        )
    return [
        Table((), top, caption=caption),
        Table((), perplexity),
        Table(rows[0], rows[1:]),
    ]


def precision_tables(p: PrecisionSearch) -> list[Table]:
    found = f"{len(p.kept)} of {len(p.operations)} operations stay in float32"
    if not p.reached:
        found = "no set of operations is enough"
    rows = [
        ("precision", f"{found}, the others are rounded to {p.dtype}"),
        ("bound", f"mean KL divergence of {number(p.bound)}"),
        ("reached", f"{number(p.kld)}; {number(p.rounded_kld)} with everything rounded"),
        ("kept", ", ".join(p.kept) or "none"),
        ("cost", f"{p.evaluations} forward passes, {p.method}"),
    ]
    steps = [(f"{'keep' if s.kept else 'release'} {s.operation}", number(s.kld)) for s in p.steps]
    return [Table((), rows), *([Table(("step", "mean KL"), steps)] if steps else [])]


def gate_table(gates: Sequence[Outcome]) -> Table:
    rows: list[Sequence[str]] = [
        (str(one.gate), number(one.value), "FAILED" if one.failed else "passed") for one in gates
    ]
    return Table(("fail if", "measured", "outcome"), rows, (1,))
