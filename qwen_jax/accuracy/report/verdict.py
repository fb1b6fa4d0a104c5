"""What a report comes to: of its tensors at some length, and of everything in one sentence."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qwen_jax.accuracy.finding import Audited, either, wrong
from qwen_jax.accuracy.logprobs.table import logs_agree, logs_verdict
from qwen_jax.accuracy.quantisation.table import quantisation_line
from qwen_jax.accuracy.report.contents import Report


class Headline(NamedTuple):
    """One sentence; "good", "bad", or "open" where nothing is judged."""

    sentence: str
    state: str


def headline(report: Report) -> Headline:
    """Of all parts that were run: what is wrong, or else that nothing is."""
    wrong, right = list(_wrong(report)), list(_right(report))
    gates, failed = report.gates, [outcome for outcome in report.gates if outcome.failed]
    named = ", ".join(str(outcome.gate) for outcome in failed)
    outcome = [f"{len(failed)} of {len(gates)} gates failed ({named})"] if failed else []
    if wrong or failed:
        return Headline(f"{'FAULT' if wrong else 'FAILED'}: {'; '.join(wrong + outcome)}.", "bad")
    outcome = [f"all {len(gates)} gates passed"] if gates else []
    if right or gates:
        said = "; ".join(right + outcome)
        unjudged = f" {skipped(report)}".rstrip()
        return Headline(f"{'NO FAULT FOUND' if right else 'PASSED'}: {said}.{unjudged}", "good")
    if report.distribution:
        d = report.distribution
        return Headline(
            f"MEASURED, NOT JUDGED: {d.candidate} has a mean KL divergence of "
            f"{d.kld.value:.2g} ± {d.kld.error:.1g} from {d.base}.",
            "open",
        )
    if report.precision:
        kept, of = len(report.precision.kept), len(report.precision.operations)
        found = f"{kept} of {of} operations stay in float32"
        if not report.precision.reached:
            found = "no set of operations in float32 is enough"
        return Headline(f"MEASURED, NOT JUDGED: {found}.", "open")
    if report.quantisation:
        said = quantisation_line(report.quantisation)
        return Headline(f"MEASURED, NOT JUDGED: {said}.", "open")
    return Headline(f"NOT JUDGED. {skipped(report)}".rstrip(), "open")


def _wrong(report: Report) -> Iterator[str]:
    if report.compiler and report.compiler.wrong:
        yield "the compiler computes wrong sums"
    if faulty := [f for f in report.findings if f.faulty]:
        causes = (
            [either(c.fault.name, c.ties) for c in report.diagnosis.causes]
            if report.diagnosis
            else []
        )
        named = f" ({', '.join(causes)})" if causes else ""
        yield (
            f"{len(faulty)} of {len(report.findings)} operations are wrong, the first is "
            f"{faulty[0].name} from position {faulty[0].position} on{named}"
        )
    if (logs := report.logprobs) and not logs_agree(logs):
        yield logs_verdict(logs).rstrip(".")
    for name, findings in _audits(report):
        if count := wrong(findings):
            yield f"{count} of {len(findings)} {name} are wrong"


def _right(report: Report) -> Iterator[str]:
    if report.findings:
        yield f"all {len(report.findings)} operations are within rounding"
    if (logs := report.logprobs) and logs_agree(logs):
        yield logs_verdict(logs).rstrip(".")
    for name, findings in _audits(report):
        if findings:
            yield f"all {len(findings)} {name} are right"


def _audits(report: Report) -> Iterator[tuple[str, Sequence[Audited]]]:
    yield "weights", report.weights or ()
    yield "texts", report.text or ()
    yield "ways through the cache", report.cache or ()
    yield "checks of the machine", report.machine or ()
    yield "operations inside the decode step", report.inside or ()


def verdict(report: Report) -> str:
    """One sentence, in capitals where something is wrong; another on what can't be judged."""
    findings, left_out = report.findings, skipped(report)
    faulty = [f for f in findings if f.faulty]
    unjudged = f" {left_out}" if left_out else ""
    if not findings:
        return f"NOT JUDGED:{unjudged}"
    if not faulty:
        worst = max(findings, key=lambda f: f.residual.ratio)
        return (
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
            hint = (
                "\nSo much that no fault explains: if this is another engine's dump, its mapping, "
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
