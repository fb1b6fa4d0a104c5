"""report.html of a comparison: every part with its verdict, pictures and tables."""

from collections.abc import Iterator, Sequence

from qwen_jax.accuracy.finding import Audited, wrong
from qwen_jax.accuracy.report import tables
from qwen_jax.accuracy.report.contents import Report
from qwen_jax.accuracy.report.verdict import headline, skipped, verdict
from qwen_jax.reporting import page
from qwen_jax.reporting.page import Block, Folded, Page, Picture, Section
from qwen_jax.reporting.table import Table


def to_html(report: Report) -> str:
    """The page; needs matplotlib."""
    with page.drawing():
        return page.html(contents(report))


def contents(report: Report) -> Page:
    """What is on it. Make it, and whatever is made of it, within `page.drawing`."""
    summary = headline(report)
    facts = [*report.model.items(), *tables.header_rows(report)]
    facts += report.origin.rows() if report.origin else []
    return Page("Accuracy report", summary.sentence, summary.state, facts, list(_sections(report)))


def _sections(report: Report) -> Iterator[Section]:
    if report.gates:
        failed = any(outcome.failed for outcome in report.gates)
        yield Section("Gates", [tables.gate_table(report.gates)], failed)
    if report.findings or skipped(report):
        faulty = any(f.faulty for f in report.findings)
        yield Section("Tensors", list(_tensors(report)), faulty)
    if report.comparison:
        yield Section("Distance from the reference", list(_distance(report)))
    for name, parts in tables.audits(report, most=None):
        blocks: list[Block] = [*parts, *_pictures_of(name, report)]
        findings: dict[str, Sequence[Audited] | None] = {
            "Weights": report.weights,
            "Text": report.text,
            "Cache": report.cache,
            "Machine": report.machine,
            "Inside the decode step": report.inside,
        }
        yield Section(name, blocks, wrong(findings.get(name) or ()) > 0)


def _tensors(report: Report) -> Iterator[Block]:
    """Each operation held against its own bound."""
    from qwen_jax.accuracy.report import pictures

    yield verdict(report)
    if diagnosis := report.diagnosis:
        if diagnosis.causes:
            yield tables.cause_table(diagnosis, tables.layers_of(report))
        if diagnosis.unknown:
            yield tables.unknown_table(diagnosis)
        if diagnosis.skipped:
            yield Folded(
                f"{len(diagnosis.skipped)} tensors not judged",
                [Table(("tensor", "why"), list(diagnosis.skipped.items()))],
            )
    if not report.comparison:
        yield tables.finding_table(report.findings)
    if report.findings:
        yield Picture(
            "Calibration: own error against its bound",
            "Each operation again in float64 from the candidate's own inputs; a mark a layer, the "
            "first one highest. Left of the line rounding explains the error. None at all and "
            "infinite ones stand at the ends.",
            pictures.calibration(report.findings),
        )


def _distance(report: Report) -> Iterator[Block]:
    """How far the candidate is from the reference, with what each tensor inherited."""
    from qwen_jax.accuracy.report import heat_maps, pictures

    comparison = report.comparison
    assert comparison is not None
    if line := tables.logits_line(comparison):
        yield line
    yield tables.operation_table(comparison)
    every = tables.tensor_table(comparison)
    yield Folded(f"All {len(every.rows)} tensors", [every])
    if comparison.missing:
        yield f"Only in one of the two: {', '.join(comparison.missing)}"
    if drawn := pictures.error_by_operation(comparison):
        yield Picture(
            "Error by operation",
            "With what was inherited; a mark a layer, the first one highest.",
            drawn,
        )
    if drawn := pictures.error_by_layer(comparison):
        yield Picture("Error by layer", "How the distance grows along the stream.", drawn)
    if found := heat_maps.by_head(comparison):
        yield Picture("Error by head", f"RMS over all positions. {found.scale}", found.drawing)
    if found := heat_maps.by_position(comparison):
        yield Picture(
            "Error by position",
            f"The worst layer of each operation. {found.scale} A dashed line stands where a call "
            "of several tokens ended.",
            found.drawing,
        )


def _pictures_of(part: str, report: Report) -> Iterator[Picture]:
    from qwen_jax.accuracy.report import pictures

    if part == "Distribution" and (d := report.distribution) and (drawn := pictures.kld(d)):
        caption = f"Of {d.candidate} from {d.base}."
        yield Picture("KL divergence, token by token", caption, drawn)
    q = report.quantisation
    if part == "Quantisation" and q and (drawn := pictures.quantised_alone(q)):
        caption = "KL divergence of the base with one tensor quantised; a mark a layer, the "
        yield Picture("What each tensor costs", f"{caption}first one highest.", drawn)
    if part == "Precision" and (p := report.precision) and (drawn := pictures.precision_steps(p)):
        caption = "From the top: what the search kept in float32 step by step, and what that gave."
        yield Picture("Precision search", caption, drawn)
