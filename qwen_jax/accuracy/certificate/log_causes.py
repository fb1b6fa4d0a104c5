"""Causes of a log that is not within its bounds: those of `logprobs`, proven within derived bounds.

The search is that of `compare --logprobs`, but what a cause has to bring every value of every text
within is the bound that the whole forward pass in float64 carries, and not a measured one.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from qwen_jax.accuracy.certificate.contents import Named
from qwen_jax.accuracy.exact.carried import Bounded
from qwen_jax.accuracy.exact.rounding import UNIT
from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.logprobs.causes import LINES
from qwen_jax.accuracy.logprobs.paths import Rows
from qwen_jax.accuracy.logprobs.reading import Logged
from qwen_jax.accuracy.logprobs.search import TOLD, judge
from qwen_jax.accuracy.logprobs.yardstick import WORST, Level, rows_of

Truth = Callable[[tuple[int, ...]], Bounded]
"""From a text's ids to the logits after each of them, and their bounds."""


@dataclasses.dataclass(frozen=True)
class Derived:
    """Bounds that are derived, as a `Measure`: there is one level, of the declared dtype.

    Attributes:
        stops: tokens that somebody may have put before a text.
        unit: roundoff of the declared dtype, in which a log-softmax may be taken, too.
    """

    truth: Truth
    stops: tuple[int, ...]
    unit: float

    @property
    def levels(self) -> tuple[Level, ...]:
        # A level's limit is so many of its rounding errors; here it is the bound itself.
        return (Level(TOLD[0], 1 / WORST, self.unit / UNIT["float32"] / WORST, 1 / WORST),)

    def rows(self, text: Logged, before: tuple[int, ...] = (), prompt: bool = True) -> Rows:
        return rows_of(text, before, prompt, lambda ids: self.truth(tuple(ids.tolist())))

    def columns(self, text: Logged, rows: Rows) -> Iterator[Rows]:
        """The values of other tokens, the first of each position, the second, and so on."""
        start, vocab = len(rows.whole) - len(text.tokens), rows.logits.shape[1]
        for column in range(max(map(len, text.top), default=0)):
            others, logged = rows.whole.copy(), np.full(len(rows.whole), np.nan)
            for place, top in enumerate(text.top, start):
                if column < len(top):
                    token, value = list(top.items())[column]
                    if token < vocab:
                        others[place], logged[place] = token, value
            yield rows._replace(others=others, logged=logged)


def named(
    log: Mapping[str, Logged], measure: Derived, digits: float, progress: Progress | None
) -> tuple[Named, ...]:
    """What all of a log's values prove, together; nothing where no cause is proven.

    Args:
        digits: half a step of the decimals that the log keeps.
    """
    found = judge(log, measure, digits, progress or (lambda done, total: None))
    if found.verdict != "cause" or found.after is None:
        return ()
    before, after = found.before.worst / WORST, found.after.worst / WORST
    ties = tuple(
        tuple(name for name in names if name not in found.causes) for names in found.others
    )
    return tuple(
        Named(
            name=name,
            line=LINES[name.split(" ")[0].rstrip(",")],
            operations=("log-probabilities",),
            layers=(None,),
            before=before,
            after=after,
            together=tuple(other for other in found.causes if other != name),
            ties=ties,
            against=(),
        )
        for name in found.causes
    )
