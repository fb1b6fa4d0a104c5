"""What a weights audit found, as a table."""

import re
from collections.abc import Sequence

from qwen_jax.accuracy.finding import WRONG, Cause
from qwen_jax.accuracy.weights.audit import WeightFinding
from qwen_jax.reporting.table import Table


def weights_table(findings: Sequence[WeightFinding]) -> Table:
    """What differs, a row for each tensor and its like in other layers with the same cause."""
    counts = [
        f"{n} {verdict}"
        for verdict in ("exact", "within rounding", "fault", "missing")
        if (n := sum(f.verdict == verdict for f in findings))
    ]
    summary = f"weights: {len(findings)} tensors, {', '.join(counts)}"
    alike: dict[tuple[str, str], list[tuple[WeightFinding, Cause | None]]] = {}
    for finding in findings:
        if finding.verdict in WRONG:
            for cause in finding.causes or (None,):
                key = re.sub(r"\.\d+\.", ".*.", finding.tensor), cause.name if cause else "unknown"
                alike.setdefault(key, []).append((finding, cause))
    header = ("tensor", "cause", "error", "planted", "what")
    rows = [_row(name, cause, group) for (name, cause), group in alike.items()]
    return Table(header, rows, (2, 3), summary)


def _row(
    pattern: str, name: str, group: Sequence[tuple[WeightFinding, Cause | None]]
) -> tuple[str, ...]:
    """The largest errors of a group, and what is to say of its first."""
    finding, cause = group[0]
    before = f"{max(f.error for f, _ in group):.2g}"
    after = f"{max(c.left for _, c in group if c):.2g}" if cause else ""
    what = f"{cause.line} {cause.detail}".strip() + "; " if cause else ""
    if len(group) == 1:
        return finding.tensor, name, before, after, f"{what}{finding.evidence}"
    what = f"in {len(group)} layers; {what}{finding.tensor}: {finding.evidence}"
    return pattern, name, before, after, what
