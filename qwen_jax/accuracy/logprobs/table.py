"""What is known of two logs as tables, the verdict first."""

from collections.abc import Iterator

from qwen_jax.accuracy.distribution.comparison import Estimate
from qwen_jax.accuracy.logprobs.audit import LogprobsReport
from qwen_jax.accuracy.logprobs.causes import LINES
from qwen_jax.accuracy.logprobs.figures import Figures, Weights
from qwen_jax.accuracy.logprobs.search import Verdict
from qwen_jax.reporting.table import Table

MOST = 5
"""Texts of other ids that are listed."""


def logprobs_tables(report: LogprobsReport) -> list[Table]:
    """Everything, in sections."""
    return [*_sections(report)]


def _sections(report: LogprobsReport) -> Iterator[Table]:
    rows = [("first", report.logs[0]), ("second", report.logs[1])]
    if report.model:
        rows.append(("model", f"{report.model}, its float32 off by {report.own:.1e} of bfloat16"))
    if any(report.only):
        rows.append(("left out", "texts in one alone: {} and {}".format(*report.only)))
    yield Table((), rows, caption=logs_verdict(report))
    if report.sides:
        yield _side_table(report)
    else:
        lines = [report.columns.line, *report.columns.notes]
        yield from (Table((), (), caption=line) for line in lines if line)
    if report.tokens:
        shown = [(one.name, one.evidence) for one in report.tokens[:MOST]]
        if len(report.tokens) > MOST:
            shown.append(("", f"and {len(report.tokens) - MOST} more"))
        yield Table(("other ids in", "what"), shown)
    if report.figures:
        yield _figures(report.figures)
        yield from _worst(report)


def logs_agree(report: LogprobsReport) -> bool:
    """Whether all that differs is rounding."""
    verdicts = {side.verdict for side in report.sides} or {report.columns.verdict}
    return not report.tokens and verdicts == {"rounding"}


def logs_verdict(report: LogprobsReport) -> str:
    """In a sentence or two."""
    differ = f" {len(report.tokens)} texts have other token ids." if report.tokens else ""
    if not report.sides:
        verdict, causes = report.columns.verdict, ", ".join(report.columns.causes)
        told = {
            "rounding": "WITHIN ROUNDING of float32.",
            "cause": f"CAUSE: {causes}.",
            "unexplained": "UNEXPLAINED without a model.",
        }[verdict]
        return told + differ
    wrong = [
        f"the {which} log has {' + '.join(side.causes)}"
        for which, side in zip(("first", "second"), report.sides, strict=True)
        if side.causes
    ]
    left = [
        f"the {which} log is {side.verdict}"
        for which, side in zip(("first", "second"), report.sides, strict=True)
        if side.verdict in ("unexplained", "not judged")
    ]
    if wrong or left:
        start = "UNEXPLAINED" if left and not wrong else "CAUSE"
        return f"{start}: {'; '.join(wrong + left)}.{differ}"
    levels = " and of ".join(dict.fromkeys(side.level for side in report.sides))
    finer = [
        f" The {which} log's lines say {side.declared}."
        for which, side in zip(("first", "second"), report.sides, strict=True)
        if side.declared
    ]
    return f"WITHIN ROUNDING of {levels}, both logs.{''.join(finer)}{differ}"


def _side_table(report: LogprobsReport) -> Table:
    caption = (
        "each log against the model: errors in roundings of that arithmetic, RMS and the largest, "
        "as it is and once the causes are recomputed"
    )
    rows = []
    for which, side in zip(("first", "second"), report.sides, strict=True):
        judged = side.verdict != "not judged"
        rows.append(
            (
                which,
                side.verdict,
                side.level or "-",
                str(side.before) if judged else "-",
                str(side.after) if side.after else "-",
                _said(side),
            )
        )
    return Table(("log", "verdict", "of", "as it is", "so", "what"), rows, caption=caption)


def _said(side: Verdict) -> str:
    lines = [f"{name}: {LINES[name.split(' ')[0].rstrip(',')]}" for name in side.causes]
    if side.others:
        lines.append(f"as well explained by {' or by '.join(' + '.join(o) for o in side.others)}")
    return "; ".join([*lines, *filter(None, (side.where, side.why))]) or "-"


def _figures(f: Figures) -> Table:
    rows = [
        ("compared", f"{f.tokens} tokens of {f.texts} texts"),
        ("KL, k1", _estimate(f.k1)),
        ("KL, k3", f"{_estimate(f.k3)} nats a token, if the first drew the tokens"),
        ("difference", f"{f.mean_abs:.3g} nats on average, {f.max_abs:.3g} at most"),
        ("ratio, token", _weights(f.by_token)),
        ("ratio, text", _weights(f.by_text)),
        ("float32 ULPs", ", ".join(f"{share:.1%} within {k}" for k, share in f.ulps)),
    ]
    return Table((), rows)


def _estimate(e: Estimate) -> str:
    return f"{e.value:.3g} ± {e.error:.2g}" if e.error == e.error else f"{e.value:.3g} (one text)"


def _weights(w: Weights) -> str:
    return f"mean {w.mean:.4g}, at most {w.max:.4g}, effective sample size {w.ess:.1%}"


def _worst(report: LogprobsReport) -> Iterator[Table]:
    assert report.figures
    rows = []
    for at, worst in enumerate(report.figures.worst):
        before, token = f"{list(worst.before)}", f"{worst.token}"
        if report.decoded:
            before, token = (f"{x!r}" for x in report.decoded[at])
        rows.append(
            (worst.name[:20], str(worst.place), f"{worst.a:.4f}", f"{worst.b:.4f}", token, before)
        )
    if rows:
        yield Table(("text", "at", "first", "second", "token", "after"), rows)
