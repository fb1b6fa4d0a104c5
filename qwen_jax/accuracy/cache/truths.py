"""What slots should hold and which log-probabilities follow, of all texts of an audit."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from qwen_jax.accuracy.cache.forward import Expected, forward
from qwen_jax.accuracy.cache.slots import Entries, Part, Row, Scenario, simulate
from qwen_jax.accuracy.exact.bounds import Arithmetic
from qwen_jax.accuracy.exact.parameters import Source
from qwen_jax.accuracy.finding import Progress
from qwen_jax.errors import UserError

Truths = dict[tuple[int, ...], list[Expected]]
"""By text: keys and values of each layer, then log-probabilities."""


def truths(
    source: Source,
    texts: Iterable[tuple[int, ...]],
    arithmetic: Arithmetic,
    used: Int[np.ndarray, "V"],
    every: int,
    progress: Progress | None = None,
) -> Truths:
    """The truth of every text that is not the beginning of another one: what comes later changes
    nothing before it.

    Args:
        used, every: as for `forward`.
        progress: hears of tensors done and in all.

    Raises:
        UserError: the model itself is not finite.
    """
    found: Truths = {}
    for text in sorted(set(texts), key=len, reverse=True):
        if not any(known[: len(text)] == text for known in found):
            found[text] = []
    of_each = list(found.values())
    total = (2 * source.config.num_layers + 1) * len(found)
    made = forward(source, [alone(text) for text in found], arithmetic, used, every)
    for done, (number, expected) in enumerate(made, 1):
        if not np.isfinite(expected.value).all():
            raise UserError(
                f"{source.config.source}: {expected.name} of the model itself are not finite, "
                "so nothing can be told of its cache; check its weights."
            )
        of_each[number].append(expected)
        if progress:
            progress(done, total)
    return found


def alone(text: tuple[int, ...]) -> Entries:
    """Of a text in one call."""
    row, count = Row(text, len(text)), len(text)
    return simulate(Scenario("alone", (row,), ((Part(0, 0, count, count),),)))[0]
