"""Drafts by looking up: what came after the last place where a text had its last few tokens.

Prompt lookup decoding (Saxena, 2023; transformers' `prompt_lookup_num_tokens`, vLLM's `ngram`),
over the prompt and the answer. It is there twice, on a device for the steps of a call, and on the
host, which thus knows what drafts would have been worth where there were none.
"""

from collections.abc import Iterator, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Int

LONGEST, SHORTEST = 4, 2
"""Tokens that must stand there again, at most and at least: of fewer, most drafts are wrong."""
NO_DRAFT = -1
_BITS = 32
"""Of a token in a run's number."""


def lookup(history: Int[Array, "R H"], length: Int[Array, "R"], most: int) -> Int[Array, "R most"]:
    """What may come next, or `NO_DRAFT` everywhere.

    Of all earlier places the one counts that agrees in the most tokens, and of these the last. What
    it would take from behind the end is what the draft itself has there, so that what has begun to
    repeat itself goes on.

    Args:
        history: tokens of texts, each from its beginning.
        length: how many there are of each, at least one.
    """
    width = history.shape[1]
    at = jnp.arange(width)
    agrees = at < length[:, None] - 1
    found = jnp.zeros(history.shape, jnp.int32)
    for n in range(LONGEST):
        last = jnp.take_along_axis(history, jnp.maximum(length - 1 - n, 0)[:, None], axis=1)
        before = jnp.pad(history, ((0, 0), (n, 0)), constant_values=NO_DRAFT)[:, :width]
        agrees = agrees & (before == last)
        found = found + agrees
    best = jnp.where(found >= SHORTEST, found * width + at, -1).max(axis=1)
    end = best % width
    period = jnp.maximum(length - 1 - end, 1)
    places = end[:, None] + 1 + jnp.arange(most) % period[:, None]
    drafted = jnp.take_along_axis(history, jnp.clip(places, 0, width - 1), axis=1)
    return jnp.where(best[:, None] >= 0, drafted, NO_DRAFT)


class Lookup:
    """The same on the host, of a text that grows."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens = tokens = list(tokens)
        # Of so many tokens: where each run of them ended last that something stands behind.
        self._ends: dict[int, dict[int, int]] = {}
        runs = tokens[:-1]
        for n in range(2, LONGEST + 1):
            # A run's number, not a tuple: thousands of those would have garbage looked for.
            runs = [
                run << _BITS | token for run, token in zip(runs, tokens[n - 1 : -1], strict=False)
            ]
            if n >= SHORTEST:
                self._ends[n] = dict(zip(runs, range(n - 1, len(tokens)), strict=False))

    def _last(self, end: int) -> Iterator[tuple[int, int]]:
        """The runs that end at a place, longer and longer: of how many tokens, and their number."""
        run = 0
        for n in range(1, min(LONGEST, end + 1) + 1):
            run |= self._tokens[end + 1 - n] << (_BITS * (n - 1))
            if n >= SHORTEST:
                yield n, run

    def add(self, token: int) -> None:
        """One more token: the runs before it have something behind them now."""
        end = len(self._tokens) - 1
        for n, run in self._last(end):
            self._ends[n][run] = end
        self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """What may come next, or nothing."""
        tokens, found = self._tokens, -1
        for n, run in self._last(len(tokens) - 1):
            if (end := self._ends[n].get(run)) is None:
                break  # Of what longer runs end in there would be one, too.
            found = end
        if found < 0:
            return []
        period = len(tokens) - 1 - found
        return [tokens[found + 1 + k % period] for k in range(most)]
