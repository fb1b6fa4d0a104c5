"""Words that the laboratory's rooms share.

What was looked at is a finding. It has a verdict and, where that is a fault, causes proven by
planting them. Each room has findings of its own with what it measures: `Finding` of an operation
(`exact.replay`), `WeightFinding`, `TextFinding`, `CacheFinding`, `MachineFinding`; and a catalogue
of its own: `Fault` (`tensors.faults`), `WeightFault`, `TextFault`, `CacheFault`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

WRONG = ("fault", "missing")
"""Verdicts that are no good news; the others are "exact", "same", "within rounding" and "told"."""

Progress = Callable[[int, int], None]
"""Hears of things done and in all."""


class Audited(Protocol):
    """A finding of whatever room."""

    @property
    def verdict(self) -> str: ...


def wrong(findings: Iterable[Audited]) -> int:
    """How many are."""
    return sum(finding.verdict in WRONG for finding in findings)


def either(name: str, ties: Iterable[Iterable[str]]) -> str:
    """A cause's name, and whatever else explains the same as well."""
    return " or ".join((name, *others(ties)))


def others(ties: Iterable[Iterable[str]]) -> list[str]:
    return [" + ".join(names) for names in ties]


@dataclasses.dataclass(frozen=True)
class Cause:
    """A fault that gives what was found, once it is planted.

    Attributes:
        line: what is wrong, in words.
        left: of the error that the finding has, in its measure.
        detail: which of the fault's variants, in words.
    """

    name: str
    line: str
    left: float
    detail: str = ""
