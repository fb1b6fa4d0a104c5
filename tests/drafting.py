"""Drafts that are granted to anyone, so that steps with drafts are seen whether they pay or not."""

from collections.abc import Iterable, Sequence

import numpy as np

from qwen_jax.engine.drafts import Drafts, Grant, Record
from qwen_jax.engine.texts import Text


class AtRandom(Drafts):
    """Drafts for anyone, of any length, paid or not."""

    rng = np.random.default_rng(11)

    def grant(self, records: Sequence[Record]) -> Grant | None:
        size = self._shapes.rows[-1]
        widths = [1] * len(records)
        for _ in range(int(self.rng.integers(0, size - len(records) + 1))):
            widths[int(self.rng.integers(len(records)))] += 1
        widths = [min(width, 1 + self._most) for width in widths]
        return Grant(size, widths, 1.0, self._most) if max(widths) > 1 else None


def accepted(texts: Iterable[Text]) -> int:
    """Tokens of drafts that are in some texts."""
    return sum(text.record.accepted for text in texts if text.record is not None)
