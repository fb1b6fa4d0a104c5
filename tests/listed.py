"""A constraint that is a list of what each place allows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

STOP = 1


class Listed:
    """Allows at each place some tokens; behind the last one a stop alone."""

    def __init__(self, places: Sequence[Sequence[int]]):
        self._left = [*places, [STOP]]
        self.form = self
        self.forced: list[int] = []

    @staticmethod
    def fill(constraints: Sequence[Any], masks: np.ndarray) -> list[str | None]:
        for held, row in zip(constraints, masks, strict=False):
            if held is None:
                continue
            row[:] = 0
            for token in held._left[0]:
                row[token // 32] |= np.uint32(1 << token % 32)
            held.forced = []
            for allowed in held._left:
                if len(allowed) > 1:
                    break
                held.forced += allowed
        return [None] * len(constraints)

    @staticmethod
    def take(constraints: Sequence[Any], tokens: Sequence[Sequence[int]]) -> None:
        for held, chosen in zip(constraints, tokens, strict=True):
            for token in chosen:
                assert token in held._left.pop(0)

    def follow(self, tokens: Sequence[int]) -> int:
        for number, token in enumerate(tokens):
            if not self._left or token not in self._left[0]:
                return number
            self._left.pop(0)
        return len(tokens)
