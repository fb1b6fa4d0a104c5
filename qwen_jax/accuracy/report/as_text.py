"""A report as plain text of at most 100 columns, the verdict first."""

from collections.abc import Iterator

from qwen_jax.accuracy.report import tables
from qwen_jax.accuracy.report.contents import Report
from qwen_jax.accuracy.report.verdict import skipped, verdict
from qwen_jax.reporting.table import Table, filled


def text(report: Report) -> str:
    """The whole report, ending in a line break."""
    return "\n\n".join(_sections(report)) + "\n"


def kept(report: Report) -> str:
    """The same for a file, whose reader does not know what was typed: model and origin, too."""
    facts = [*report.model.items(), *(report.origin.rows() if report.origin else ())]
    return text(report) + (f"\n{Table((), facts).text()}\n" if facts else "")


def _sections(report: Report) -> Iterator[str]:
    if head := tables.header_rows(report):
        yield Table((), head).text()
    if report.findings or skipped(report):
        yield "\n".join(map(filled, verdict(report).splitlines()))
    if report.diagnosis and report.diagnosis.causes:
        yield tables.cause_table(report.diagnosis, tables.layers_of(report)).text()
    if report.diagnosis and report.diagnosis.unknown:
        yield tables.unknown_table(report.diagnosis).text()
    if report.comparison:
        yield tables.operation_table(report.comparison).text()
        if line := tables.logits_line(report.comparison):
            yield filled(line)
    elif report.findings:
        yield tables.finding_table(report.findings).text()
    for _, parts in tables.audits(report):
        yield from (part.text() for part in parts)
    if report.gates:
        yield tables.gate_table(report.gates).text()
