"""A report as plain text of at most 100 columns, the verdict first."""

import textwrap
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_jax.accuracy.cache.audit import cache_table
from qwen_jax.accuracy.distribution.comparison import Distribution, Estimate
from qwen_jax.accuracy.exact.replay import Finding
from qwen_jax.accuracy.gates import Outcome
from qwen_jax.accuracy.logprobs.table import logprobs_table
from qwen_jax.accuracy.measures.error_shape import ranges
from qwen_jax.accuracy.report.contents import Report
from qwen_jax.accuracy.tensors.comparison import Comparison, Row
from qwen_jax.accuracy.tensors.diagnosis import Diagnosis
from qwen_jax.accuracy.tensors.precision_search import PrecisionSearch
from qwen_jax.accuracy.text.audit import text_table
from qwen_jax.accuracy.text_table import WIDTH, table
from qwen_jax.accuracy.traces.trace import AXES, Header
from qwen_jax.accuracy.weights.table import weights_table


def text(report: Report) -> str:
    """The whole report, ending in a line break."""
    return "\n\n".join(_sections(report)) + "\n"


def _sections(report: Report) -> Iterator[str]:
    if head := header_rows(report):
        yield pairs(head)
    if report.findings or skipped(report):
        yield verdict(report)
    if report.diagnosis and report.diagnosis.causes:
        yield cause_table(report.diagnosis, layers_of(report))
    if report.diagnosis and report.diagnosis.unknown:
        yield aligned(unknown_rows(report.diagnosis), (1,))
    if report.comparison:
        yield operation_table(report.comparison)
        if line := logits_line(report.comparison):
            yield line
    elif report.findings:
        yield finding_table(report.findings)
    yield from (section for _, section in audits(report))
    if report.gates:
        yield aligned(gate_rows(report.gates), (1,))


def audits(report: Report) -> Iterator[tuple[str, str]]:
    """The sections that stand for themselves, with a title for the page."""
    if report.weights is not None:
        yield "Weights audit", weights_table(report.weights)
    if report.text is not None:
        yield "Text audit", text_table(report.text)
    if report.cache is not None:
        yield "Cache audit", cache_table(report.cache)
    if report.distribution:
        yield "Distribution report", distribution_table(report.distribution)
    if report.precision:
        yield "Precision search", precision_table(report.precision)
    if report.logprobs:
        yield "Log-probabilities", logprobs_table(report.logprobs)


def number(x: float) -> str:
    """Two significant digits; exponents without their leading zero."""
    return f"{x:.2g}".replace("e-0", "e-").replace("e+0", "e+")


def right(rows: Sequence[Sequence[str]], columns: Sequence[int]) -> list[list[str]]:
    """The rows, header first, with these columns filled up on the left."""
    widths = {i: max(len(row[i]) for row in rows) for i in columns}
    return [[cell.rjust(widths.get(i, 0)) for i, cell in enumerate(row)] for row in rows]


Rows = tuple[Sequence[str], list[Sequence[str]]]
"""A header and the lines under it."""


def aligned(rows: Rows, columns: Sequence[int]) -> str:
    first, *others = right([rows[0], *rows[1]], columns)
    return table(first, others)


def filled(sentence: str) -> str:
    return textwrap.fill(sentence, WIDTH)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    return table(rows[0], rows[1:])


def describe(header: Header) -> str:
    dtypes = header.dtype
    if header.activation_dtype != header.dtype:
        dtypes = f"parameters {header.dtype} and activations {header.activation_dtype}"
    return f"{header.implementation}, {dtypes}, {header.device}: {header.model}"


def header_rows(report: Report) -> list[tuple[str, str]]:
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


def verdict(report: Report) -> str:
    """One sentence, in capitals where something is wrong; another on what can't be judged."""
    findings, left_out = report.findings, skipped(report)
    faulty = [f for f in findings if f.faulty]
    unjudged = f" {left_out}" if left_out else ""
    if not findings:
        return filled(f"NOT JUDGED:{unjudged}")
    if not faulty:
        worst = max(findings, key=lambda f: f.residual.ratio)
        return filled(
            f"WITHIN ROUNDING: all {len(findings)} operations stay inside their bounds; "
            f"{worst.name} comes closest, to {worst.residual.ratio:.2f} of it.{unjudged}"
        )
    first = faulty[0]
    causes = hint = ""
    if report.diagnosis:
        named, unknown = len(report.diagnosis.causes), len(report.diagnosis.unknown)
        causes = (
            f"; {named} cause{'s' * (named != 1)} named, "
            f"{unknown} operation{'s' * (unknown != 1)} unexplained"
        )
        if 3 * unknown > len(findings):
            hint = "\n" + filled(
                "So much that no fault explains: if this is another engine's dump, its mapping, "
                "its dtype or the model file is likelier to be wrong than so many operations."
            )
    return (
        f"FAULT: {len(faulty)} of {len(findings)} operations{causes}.\n"
        f"First wrong tensor: {first.name}, from position {first.position} on.{hint}"
    )


def skipped(report: Report) -> str:
    """A sentence on recorded tensors that could not be judged, empty where there is none."""
    names = list(report.diagnosis.skipped.items()) if report.diagnosis else []
    if not names:
        return ""
    (name, why), count = names[0], len(names)
    tensors = "tensor is" if count == 1 else "tensors are"
    return f"{count} recorded {tensors} not judged; {name} {why}."


def show_layers(layers: Sequence[int | None], count: int) -> str:
    inside = [layer for layer in layers if layer is not None]
    return ranges(np.isin(np.arange(count), inside)) if inside else "-"


def cause_table(diagnosis: Diagnosis, layers: int) -> str:
    caption = "causes, with the own error over its bound as it is and once the cause is planted"
    return f"{caption}\n\n{aligned(cause_rows(diagnosis, layers), (2, 3))}"


def cause_rows(diagnosis: Diagnosis, layers: int) -> Rows:
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
            what += f"; as well explained by {' or '.join(' + '.join(t) for t in cause.ties)}"
        if cause.against:
            what += f"; but not seen in {', '.join(cause.against)}"
        before, after = number(cause.before.ratio), number(cause.after.ratio)
        rows.append((cause.fault.name, where, before, after, what))
    return ("cause", "layers", "as it is", "planted", "what and where"), rows


def unknown_rows(diagnosis: Diagnosis) -> Rows:
    rows: list[Sequence[str]] = [
        (one.finding.name, number(one.finding.residual.ratio), str(one.shape))
        for one in diagnosis.unknown
    ]
    return ("unknown fault in", "of bound", "where"), rows


def operation_table(comparison: Comparison) -> str:
    """One line an operation: the layer where it is worst, and how many layers are at fault."""
    rows: list[Sequence[str]] = []
    for operation in AXES:
        group = [row for row in comparison.rows if row.operation == operation]
        if group:
            rows.append(_operation_row(operation, group))
    caption = filled(
        "tensors against the reference, the worst layer of each; ULPs are the median's, and 'of "
        "bound' is the operation's own error, without what it inherited"
    )
    names = ("operation", "layer", "rms error", "max error", "1 - cosine", "ULPs", "NaN+Inf")
    return f"{caption}\n\n{aligned(((*names, 'of bound', 'verdict'), rows), range(1, 8))}"


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


def tensor_rows(comparison: Comparison) -> Rows:
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
    return (*names, "ULPs max / median", "NaN / Inf", "of bound", "verdict"), rows


def _verdict(verdicts: Sequence[str]) -> str:
    wrong = verdicts.count("fault")
    if wrong:
        return "FAULT" if len(verdicts) == 1 else f"FAULT in {wrong} of {len(verdicts)}"
    return "not judged" if "not judged" in verdicts else "ok"


def logits_line(comparison: Comparison) -> str:
    if (logits := comparison.logits) is None:
        return ""
    return filled(
        f"next token: KL divergence {number(logits.mean_kld)} on average, {number(logits.max_kld)} "
        f"at most; same likeliest token {logits.top1:.1%}, of the likeliest {logits.k} "
        f"{logits.topk:.1%} shared"
    )


def finding_table(findings: Sequence[Finding]) -> str:
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
    return aligned((("operation", "layer", "own error", "of bound", "verdict"), rows), (1, 2, 3))


def distribution_table(d: Distribution) -> str:
    def both(e: Estimate) -> str:
        return f"{e.value:12.6f} ± {e.error:.6f}"

    # Adding zero makes -0.000 positive.
    def percent(x: float) -> str:
        return f"{round(100 * x, 3) + 0.0:8.3f} %"

    def percents(e: Estimate) -> str:
        return f"{100 * e.value:8.3f} ± {100 * e.error:.3f} %"

    top = [
        ("candidate", d.candidate),
        ("base", d.base),
        ("scored", f"{len(d.scores.kld)} tokens, of {d.contexts} windows of {d.context}"),
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
    return "\n\n".join(["distribution\n" + pairs(top), pairs(perplexity), table(rows[0], rows[1:])])


def precision_table(p: PrecisionSearch) -> str:
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
    steps = [("step", "mean KL")]
    steps += [(f"{'keep' if s.kept else 'release'} {s.operation}", number(s.kld)) for s in p.steps]
    return pairs(rows) + (f"\n\n{table(steps[0], steps[1:])}" if p.steps else "")


def gate_rows(gates: Sequence[Outcome]) -> Rows:
    rows: list[Sequence[str]] = [
        (str(one.gate), number(one.value), "FAILED" if one.failed else "passed") for one in gates
    ]
    return ("fail if", "measured", "outcome"), rows
