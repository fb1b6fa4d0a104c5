"""`--max_time` and `--stop_worse`: when an experiment leaves points out."""

import time
from pathlib import Path

from qwen_jax.experiments.answers import answer as answers
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.experiments.answers.statistics import LEVEL
from qwen_jax.experiments.plan import Planned
from qwen_jax.experiments.report.results import Results

LOOKS = 10
"""Looks at the results for which the level is divided: who looks often finds by luck."""


class OutOfTime(Exception):
    """The time is up: what is recorded by now is gone on with another time."""


class Clock:
    """How long a session may take.

    Args:
        seconds: None for as long as it likes.
    """

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def check(self) -> None:
        """Raises OutOfTime."""
        if self.is_over:
            raise OutOfTime


def why_hopeless(directory: Path, item: Planned, asked: Asked) -> str:
    """Why a point needn't be run: earlier seeds of its setting are worse than the best one, by
    the paired test of reports at a tenth of its level. Nothing where that isn't so."""
    results = Results.read([directory], asked)
    own = next((row for row in results.rows if row.id == item.point.id), None)
    found = answers.answer(results.settings, Asked(results.asked.metric, None, asked.better))
    if own is None or found is None:
        return ""
    for entry in found.entries:
        shared = entry.setting.overrides.items()
        is_own = all(own.overrides.get(field) == value for field, value in shared)
        if is_own and entry.verdict == "worse" and (entry.p or 0) < LEVEL / LOOKS:
            return (
                f"{found.metric} of its earlier seeds is {entry.mean:.3g}, which is worse than the "
                f"{found.entries[0].mean:.3g} of {found.baseline.label} (p = {entry.p:.1g})"
            )
    return ""
