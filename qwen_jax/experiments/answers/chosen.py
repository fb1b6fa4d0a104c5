"""On which metric points are ranked, and which end of it is the better one."""

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence

from qwen_jax.errors import UserError

WAYS = ("auto", "higher", "lower")

LOWER = frozenset(
    {
        *("kld", "kld_p99", "kld_max", "perplexity", "perplexity_ratio", "nll", "ms_per_step"),
        *("word_perplexity", "byte_perplexity", "bits_per_byte", "edit_distance", "repetition"),
        *("weight_bytes", "device_bytes", "model_seconds", "brier_score", "joules_per_token"),
        *(f"{what}_p{q}_ms" for what in ("ttft", "tpot", "latency") for q in (50, 90, 99)),
    }
)
"""Metrics of which less is better, by what follows a task's name and a point."""

_FIRST = ("kld", "nll", "decode_tokens_per_s", "good_per_s")
"""What the tasks that have them are about."""

_SAYS_NOTHING = ("tokens_per_answer", "ended_by_itself", "prompts", "model_seconds", "count")
_SPEED = ("tokens_per_s", "joules_per_token")
_MEAN_OF = {"perplexity": "nll"}
"""A metric that is no mean over units, and the one it grows with that is."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a config or flags say of the answer; None where they say nothing.

    Attributes:
        metric: on which points are ranked.
        baseline: what they are compared with, as in "temperature=0"; else the best of them.
        better: "higher", "lower", or "auto", which knows the metrics of this program.
    """

    metric: str | None = None
    baseline: str | None = None
    better: str = "auto"

    @classmethod
    def of(cls, fields: Mapping[str, str | None]) -> "Asked":
        """Of a config's group `answer`. Raises UserError for a way that there is not."""
        asked = cls(fields.get("metric"), fields.get("baseline"), fields.get("better") or "auto")
        if asked.better not in WAYS:
            raise UserError(
                f"answer.better is {asked.better!r:.60}, but it must be one of {', '.join(WAYS)}."
            )
        return asked

    def over(self, other: "Asked") -> "Asked":
        """This, and where it says nothing the other."""
        better = other.better if self.better == "auto" else self.better
        return Asked(self.metric or other.metric, self.baseline or other.baseline, better)

    def fields(self) -> dict[str, str]:
        """As a record holds them: what is said alone."""
        return {name: value for name, value in vars(self).items() if value not in (None, "auto")}


def metric(asked: Asked, there: Sequence[str], scored: Iterable[str]) -> str | None:
    """The metric to rank on, or None where there is none that says what is good.

    Args:
        there: metrics of the points.
        scored: those that have values of units, in the order of their scores.

    Raises:
        UserError: the one that is asked for is not there.
    """
    if asked.metric is not None:
        check(asked, there)
        wanted = _MEAN_OF.get(asked.metric, "")
        return wanted if wanted in there else asked.metric
    known = [name for name in _FIRST if name in there]
    usual = [name for name in there if name not in _SAYS_NOTHING and name not in _SPEED]
    speeds = [name for name in there if name in _SPEED]
    return next(iter([*known, *(name for name in scored if name in there), *usual, *speeds]), None)


def check(asked: Asked, there: Collection[str]) -> None:
    """Raises UserError where the metric that is asked for is none of those that there are."""
    if asked.metric is None or asked.metric in there:
        return
    near = difflib.get_close_matches(asked.metric, there, n=1)
    meant = f"did you mean {near[0]}? There are" if near else "there are"
    raise UserError(
        f"--metric={asked.metric:.60} is no metric of these points; {meant} {', '.join(there)}."
    )


def lower_is_better(asked: Asked, name: str) -> bool:
    if asked.better == "auto":
        return name.rpartition(".")[2] in LOWER or name.partition(".")[2] in LOWER
    return asked.better == "lower"
