"""What a log within its bounds may have all the same: causes that are planted and not excluded.

A bound excludes a cause where, with the cause planted in the model's own log-probabilities, some
value of the log lies outside the bound that it then has. What is left fits the log as well as no
cause does; a certificate names it, and by how much it moves these values.
"""

from collections.abc import Collection, Iterator

import numpy as np

from qwen_jax.accuracy.certificate.log_causes import Derived
from qwen_jax.accuracy.logprobs import causes
from qwen_jax.accuracy.logprobs.causes import Changes
from qwen_jax.accuracy.logprobs.paths import Path, Predicted, predict
from qwen_jax.accuracy.logprobs.reading import Logged
from qwen_jax.accuracy.logprobs.search import Context, contexts
from qwen_jax.accuracy.logprobs.yardstick import at


class Open:
    """The catalogue's causes that the texts seen so far don't exclude.

    Numbers are the mildest that are in use (`causes.mild`), or what the log's lines declare.

    Args:
        texts: of the log.
        digits: half a step of the decimals that the log keeps.
    """

    def __init__(self, texts: Collection[Logged], measure: Derived, digits: float):
        self._measure, self._digits, self._seen = measure, digits, False
        planted = causes.mild([text.sampling for text in texts])
        self._left: dict[Changes | Context, float] = dict.fromkeys(
            [*planted, *contexts(texts, measure.stops)], 0.0
        )

    @property
    def moves(self) -> dict[str, float]:
        """Each cause's name, and the most that it moves one of the values, in nats; none where no
        text had a value."""
        if not self._seen:
            return {}
        return {_name(cause): moved for cause, moved in self._left.items()}

    def see(self, text: Logged) -> None:
        """Drops what this text excludes; it has its prompt's ids."""
        self._seen = True
        plain = list(_predicted(text, self._measure, self._digits, ()))
        for cause in list(self._left):
            planted = list(_predicted(text, self._measure, self._digits, cause))
            if any((one.ratio > 1).any() for one in planted):
                del self._left[cause]
            else:
                self._left[cause] = max(self._left[cause], *map(_moved, plain, planted))


def _predicted(
    text: Logged, measure: Derived, digits: float, cause: Changes | Context
) -> Iterator[Predicted]:
    """What is logged of a text with a cause planted: of its tokens, and of others beside them."""
    (level,) = measure.levels
    context = cause if isinstance(cause, Context) else Context("")
    path = Path() if isinstance(cause, Context) else causes.path(cause, text.sampling)
    rows = measure.rows(text, context.before, context.prompt)
    # Nothing is compared within the prompt; a cause may look one position further back.
    behind = slice(max(len(rows.whole) - len(text.tokens) - 2, 0), None)
    for each in (rows, *measure.columns(text, rows)):
        yield predict(path, at(each.take(behind), level), digits)


def _moved(plain: Predicted, planted: Predicted) -> float:
    """The largest difference of two predictions of the same values.

    Without its prompt a text's first token has none.
    """
    some, others = (one.value[one.there] for one in (plain, planted))
    both = min(len(some), len(others))
    return float(np.abs(some[len(some) - both :] - others[len(others) - both :]).max(initial=0.0))


def _name(cause: Changes | Context) -> str:
    if isinstance(cause, Context):
        return cause.name
    return " + ".join(change.said for change in cause)
