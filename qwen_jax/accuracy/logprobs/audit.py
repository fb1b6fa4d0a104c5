"""Two logs of log-probabilities, compared and explained as far as they and the model allow."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.accuracy.logprobs.columns import Columns, columns
from qwen_jax.accuracy.logprobs.figures import Figures, figures, paired
from qwen_jax.accuracy.logprobs.reading import Logged, read
from qwen_jax.accuracy.logprobs.search import Verdict, judge
from qwen_jax.accuracy.logprobs.yardstick import Yardstick
from qwen_jax.api import Model
from qwen_jax.weights.loader import Checkpoint

MOST_DECIMALS = 9
"""What is written with more keeps float32 whole."""


@dataclasses.dataclass(frozen=True)
class TokensDiffer:
    """A text whose ids are others in the two logs: what is different, in words."""

    name: str
    evidence: str


@dataclasses.dataclass(frozen=True)
class LogprobsReport:
    """All that is known.

    Attributes:
        logs: the two files.
        only: texts that only the first has, and only the second.
        tokens: texts of other ids, which are in no figure.
        figures: of the others; None where no token has a value in both.
        columns: what the two prove without a model.
        sides: each held against the model; none without one.
        model: which.
        own: of that model's float32, its error over that of bfloat16.
        decoded: the worst tokens with what stands before them, as text, where there is a model.
    """

    logs: tuple[str, str]
    only: tuple[int, int]
    tokens: tuple[TokensDiffer, ...]
    figures: Figures | None
    columns: Columns
    sides: tuple[Verdict, ...] = ()
    model: str | None = None
    own: float = 0.0
    decoded: tuple[tuple[str, str], ...] = ()

    @property
    def causes(self) -> tuple[str, ...]:
        """Every proven one; differing ids are proven by the logs themselves."""
        found = [name for side in self.sides for name in side.causes]
        if not self.sides:
            found += self.columns.causes
        return tuple(dict.fromkeys([*found, *(["token_ids"] if self.tokens else [])]))

    @property
    def unexplained(self) -> int:
        """Logs that nothing explains, or that could not be judged."""
        if self.sides:
            return sum(side.verdict in ("unexplained", "not judged") for side in self.sides)
        return int(self.columns.verdict == "unexplained")


@dataclasses.dataclass(frozen=True)
class Judge:
    """What logs are held against: the same model in float32 and in bfloat16, and its file."""

    exact: Model
    rough: Model
    checkpoint: Checkpoint


def compare_logs(
    a: str | Path | Mapping[str, Logged],
    b: str | Path | Mapping[str, Logged],
    judge_by: Judge | None = None,
    *,
    names: tuple[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LogprobsReport:
    """Compares two logs of the same texts.

    Args:
        a: the first log, of whoever drew the tokens.
        b: the second.
        judge_by: the model, if it is at hand; without it only what two columns prove is said.
        names: what to call the two.
        progress: called with texts done and in all, in every pass over a log.

    Raises:
        UserError: a log can't be read (see `reading.read`), they have no text in common, or a text
            doesn't fit the model.
    """
    names = names or (
        str(a) if isinstance(a, str | Path) else "the first log",
        str(b) if isinstance(b, str | Path) else "the second log",
    )
    logs = [read(x) if isinstance(x, str | Path) else x for x in (a, b)]
    same, others = paired(logs[0], logs[1], names)
    digits = half_step(logs[0]), half_step(logs[1])
    both = len(same) + len(others)
    found = LogprobsReport(
        logs=names,
        only=(len(logs[0]) - both, len(logs[1]) - both),
        tokens=tuple(TokensDiffer(one.name, _differ(one, other)) for one, other in others),
        figures=figures(same),
        columns=columns(same, digits),
    )
    if judge_by is None:
        return found
    exact = judge_by.exact
    sides: list[Verdict] = []
    own = 0.0
    yardstick: Yardstick | None = None
    for log, half in zip(logs, digits, strict=True):
        # Prompts that one log leaves out may stand in the other.
        known = {name: with_prompt(text, logs, name) for name, text in log.items()}
        whole = [text for text in known.values() if text.prompt is not None and len(text.whole)]
        if whole and yardstick is None:
            longest = max(whole, key=lambda text: len(text.whole))
            yardstick = Yardstick.of(exact, judge_by.rough, judge_by.checkpoint, longest)
            own = yardstick.own
        if yardstick is None:
            why = "the prompts' ids are not in the log ('prompt')"
            sides.append(Verdict("not judged", why=why))
        else:
            sides.append(judge(known, yardstick, half, progress))
    return dataclasses.replace(
        found,
        sides=tuple(sides),
        model=exact.config.source,
        own=own,
        decoded=tuple(_decoded(exact, found.figures)),
    )


def with_prompt(text: Logged, logs: Sequence[Mapping[str, Logged]], name: str) -> Logged:
    """The text with its prompt's ids, where any of the logs has them."""
    if text.prompt is not None:
        return text
    prompts = (log[name].prompt for log in logs if name in log)
    return dataclasses.replace(text, prompt=next((p for p in prompts if p is not None), None))


def half_step(log: Mapping[str, Logged]) -> float:
    """Half a step of the decimals that all values of a log keep; 0 where they keep float32."""
    most = 0
    for text in log.values():
        for value in text.logprobs[~np.isnan(text.logprobs)]:
            exponent: Any = Decimal(repr(float(value))).as_tuple().exponent
            most = max(most, -exponent)
            if most > MOST_DECIMALS:
                return 0.0
    # Numbers of a narrow dtype may have few decimals, and are no rounded ones.
    return 0.0 if most == 0 else 0.5 * 10.0**-most


def _differ(one: Logged, other: Logged) -> str:
    a, b = one.whole.tolist(), other.whole.tolist()
    for first, second, which in ((a, b, "second"), (b, a, "first")):
        if len(second) == len(first) + 1 and second[1:] == first:
            return f"the {which} has the token {second[0]} before the text (as a BOS)"
    least = min(len(a), len(b))
    at = next((i for i in range(least) if a[i] != b[i]), least)
    if at == least:
        return f"{len(a)} tokens in the first, {len(b)} in the second, alike up to the shorter end"
    return f"from token {at} on: {a[at : at + 4]} in the first, {b[at : at + 4]} in the second"


def _decoded(model: Model, found: Figures | None) -> Sequence[tuple[str, str]]:
    if found is None:
        return []
    vocab = model.config.vocab_size
    return [
        tuple(  # type: ignore[misc]
            model.tokenizer.decode([i for i in ids if i < vocab])
            for ids in (worst.before, (worst.token,))
        )
        for worst in found.worst
    ]
