"""Which texts are drafted for, and how many tokens: as far as it pays.

A step of more rows takes longer. What drafts bring is known from what they brought lately; where
tokens are looked up, also while there are none, since the same looking up on the host says what a
draft would have been and the text what would have been accepted. Whatever that promises, a ledger
bounds what was lost.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from qwen_jax.engine.lookup import Lookup
from qwen_jax.engine.shapes import Shapes, fitting
from qwen_jax.engine.texts import Text

MOST_DRAFTED = 15
"""Tokens of a draft, at most: of more the last ones are hardly ever accepted."""
USUAL_DRAFTED = 7
ENOUGH = 3
"""Tokens of a draft for which it takes no larger step than there is already."""
RECENT = 0.25
"""Weight of a text's last step in what drafts are worth to it."""
MARGIN, OVERHEAD = 1.5, 0.1
"""Drafts have to promise so many times what a larger step costs, and this share of a step besides:
looking up takes time, too."""
LOSS_SHARE, LOSS_FREE = 0.02, 2.0
"""What drafts may have cost in all: a share of all steps, and so many steps besides."""
MOST_CREDIT = 16.0
"""Steps gained that count against later losses."""
RECOVERY = 0.02
"""How much of its first promise a draft model has again after each token without one."""


class Grant(NamedTuple):
    """One call's rows.

    Attributes:
        size: rows of the program.
        widths: of each text so many rows, one more than there are drafted tokens.
        cost: of its steps, in steps without drafts.
    """

    size: int
    widths: list[int]
    cost: float

    @property
    def drafting(self) -> list[bool]:
        return [width > 1 for width in self.widths]


class Record:
    """What drafts bring a text, or would.

    Args:
        tokens: its prompt.
        most: tokens of a draft.
        promise: of a draft model, tokens a step that are expected where nothing is known; None
            where tokens are looked up, which the text itself tells.

    Attributes:
        worth: tokens a step, as of late.
        drafted, accepted: tokens, in all.
    """

    def __init__(self, tokens: Sequence[int], most: int, promise: float | None):
        self.most, self.drafted, self.accepted = most, 0, 0
        self._promise, self.worth = promise, 1.0 if promise is None else promise
        self._lookup = Lookup(tokens) if promise is None else None
        self._draft: list[int] = [] if self._lookup is None else self._lookup.draft(most)
        self._agreed = 0

    def read(self, tokens: Sequence[int], drafted: Sequence[int], grown: Sequence[int]) -> None:
        """Goes on behind what a call chose.

        Args:
            tokens: all it chose.
            drafted: tokens that were drafted in each of its steps; nothing in one without drafts.
            grown: tokens that each of these steps gave.
        """
        self.drafted += sum(drafted)
        self.accepted += sum(n - 1 for n in grown if n)
        if self._lookup is not None:
            for token in tokens:
                self._follow(token, self._lookup)
            return
        assert self._promise is not None
        for n in filter(None, grown):
            self.worth += RECENT * (n - self.worth)
        if not grown:
            self.worth += RECOVERY * len(tokens) * max(self._promise - self.worth, 0)

    def _follow(self, token: int, lookup: Lookup) -> None:
        """A draft is followed as far as it agrees; the token after that is the model's own."""
        agrees = self._agreed < len(self._draft) and self._draft[self._agreed] == token
        lookup.add(token)
        if agrees:
            self._agreed += 1
            return
        self.worth += RECENT * (1 + self._agreed - self.worth)
        self._draft, self._agreed = lookup.draft(self.most), 0


@dataclasses.dataclass
class Ledger:
    """What drafts have cost, in steps without them; less than nothing where they have gained."""

    lost: float = 0.0
    steps: float = 0.0

    @property
    def open(self) -> bool:
        """Whether more may be lost."""
        return self.lost <= LOSS_FREE + LOSS_SHARE * self.steps

    def plain(self, steps: int) -> None:
        self.steps += steps

    def step(self, cost: float, grown: Sequence[int]) -> None:
        """A step at that cost, and how many tokens each text got that was there."""
        there = [n for n in grown if n]
        if there:
            gained = sum(n - 1 for n in there) / len(there)
            self.steps += 1 + gained
            self.lost = max(self.lost + cost - 1 - gained, -MOST_CREDIT)


class Drafts:
    """Who gets drafts in one scheduler.

    Args:
        most: tokens of a draft.
        share: what a draft model's step of one token takes, in steps of the model; None where
            tokens are looked up.
    """

    def __init__(self, shapes: Shapes, most: int, share: float | None = None):
        self._shapes, self._most, self._share = shapes, most, share
        self.ledger = Ledger()

    def record(self, text: Text) -> Record:
        """Of a text that begins."""
        return Record(text.tokens, self._most, None if self._share is None else 1 + self._most / 2)

    def grant(self, records: Sequence[Record]) -> Grant | None:
        """The smallest step with room for drafts that pay, or None where there is none.

        Args:
            records: of all texts of a call.
        """
        if not self.ledger.open:
            return None
        texts, found = len(records), None
        usual = self._shapes.cost(fitting(self._shapes.rows, texts))
        by_worth = sorted(range(texts), key=lambda i: -records[i].worth)
        for size in self._shapes.rows:
            if (spare := size - texts) < 1:
                continue
            count = min(texts, max(1, spare // ENOUGH))
            count = sum(records[i].worth > 1 + OVERHEAD for i in by_worth[:count])
            if count == 0:
                break
            each = min(self._most, spare // count)
            cost = self._shapes.cost(size) / usual + (self._share or 0) * (each + 1)
            gained = sum(min(records[i].worth - 1, each) for i in by_worth[:count])
            if gained < texts * (MARGIN * (cost - 1) + OVERHEAD):
                continue
            chosen = set(by_worth[:count])
            widths = [1 + each * (i in chosen) for i in range(texts)]
            if found is None or found.widths[by_worth[0]] <= ENOUGH:
                found = Grant(size, widths, cost)
        return found
