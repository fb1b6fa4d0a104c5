"""Which texts are drafted for, and how many tokens: as far as it pays.

A step of more rows takes longer. What drafts bring is known from what they brought lately; where
tokens are looked up, also while there are none, since the same looking up on the host says what a
draft would have been and the text what would have been accepted. A draft model has to be tried, a
few steps at a time. Whatever either promises, a ledger bounds what was lost.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from qwen_jax.engine.lookup import Lookup
from qwen_jax.engine.shapes import Shapes, fitting

MOST_DRAFTED = 15
"""Tokens of a draft, at most: of more the last ones are hardly ever accepted."""
USUAL_DRAFTED = 7
FEW = 3
"""Tokens of a draft where texts share what rows there are; rather than fewer, some have none. And
of one that a draft model is tried with."""
RECENT = 0.25
"""Weight of a text's last step in what drafts are worth to it."""
MARGIN, OVERHEAD = 1.5, 0.1
"""Drafts have to promise so many times what a larger step costs, and this share of a step besides:
looking up takes time, too."""
LOSS_SHARE, LOSS_FREE = 0.008, 0.5
"""What drafts may have cost in all: a share of all steps, and so many steps besides. It is two
fifths of what they may really cost: calls of few steps and a draft model that has to catch up are
the rest (benchmarks/results/gpu_speculation.md)."""
MOST_CREDIT = 16.0
"""Steps gained that count against later losses, at most."""
TRIAL = 2
"""Steps of a call in which a draft model is tried. The next such call waits for what it brought."""
RECOVERY = 0.02
"""How much of its first promise a draft model has again after each token without one."""


class Grant(NamedTuple):
    """One call's rows.

    Attributes:
        size: rows of the program.
        widths: of each text so many rows, one more than there are drafted tokens.
        cost: of its steps, in steps without drafts.
        most: tokens that are drafted for a text.
        trial: whether it is to have few steps.
    """

    size: int
    widths: list[int]
    cost: float
    most: int
    trial: bool = False


class Record:
    """What drafts bring a text, or would.

    Args:
        tokens: its prompt.
        most: tokens of a draft.
        promise: of a draft model, tokens a step that are expected where nothing is known; None
            where tokens are looked up, which the text itself tells.

    Attributes:
        tokens: all that are known.
        worth: tokens a step, as of late.
        drafted, accepted: tokens, in all.
        missing: positions that the draft model has not seen, each from the first to after the last.
        proven: whether the last drafts paid; drafts that are looked up need no trial.
        tried: whether drafts are being tried, and it is not known yet what they bring.
    """

    def __init__(self, tokens: Sequence[int], most: int, promise: float | None):
        self.tokens = list(tokens)
        self.drafted = self.accepted = 0
        self.worth = 1.0 if promise is None else promise
        self.missing: list[tuple[int, int]] = []
        self.proven, self.tried = promise is None, False
        self._most, self._promise = most, promise
        self._lookup: Lookup | None = None
        self._followed = self._agreed = 0
        self._draft: list[int] = []

    def read(self, chosen: Sequence[int]) -> None:
        """Goes on behind what a call without drafts chose."""
        if self._promise is not None:
            first = len(self.tokens) - 1
            self.missing.append((first, first + len(chosen)))
            self.worth += RECOVERY * len(chosen) * max(self._promise - self.worth, 0)
        self.tokens += chosen

    def read_drafted(
        self, chosen: Sequence[int], drafted: int, grown: Sequence[int], cost: float
    ) -> None:
        """Goes on behind what a call with drafts chose.

        Args:
            drafted: tokens, in all.
            grown: tokens that each of its steps gave, 0 of those after the text's end.
            cost: of a step.
        """
        self.drafted += drafted
        self.accepted += sum(n - 1 for n in grown if n)
        self.tried = False
        if self._promise is not None and (there := [n for n in grown if n]):
            for n in there:
                self.worth += RECENT * (n - self.worth)
            self.proven = sum(there) > cost * len(there)
        self.tokens += chosen

    def follow(self) -> None:
        """Brings `worth` up to date: a draft is followed as far as it agrees; the token after that
        is the model's own. Not before somebody asks, since where all slots run nobody does."""
        if self._promise is not None:
            return
        if self._lookup is None:
            self._lookup, self._followed = Lookup(self.tokens), len(self.tokens)
            self._draft = self._lookup.draft(self._most)
        for token in self.tokens[self._followed :]:
            agrees = self._agreed < len(self._draft) and self._draft[self._agreed] == token
            self._lookup.add(token)
            if agrees:
                self._agreed += 1
                continue
            self.worth += RECENT * (1 + self._agreed - self.worth)
            self._draft, self._agreed = self._lookup.draft(self._most), 0
        self._followed = len(self.tokens)


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
        share: what a draft model takes for one token, in steps of the model; None where tokens are
            looked up.
    """

    def __init__(self, shapes: Shapes, most: int, share: float | None = None):
        self._shapes, self._most, self._share = shapes, most, share
        self.ledger = Ledger()

    def record(self, tokens: Sequence[int]) -> Record:
        """Of a text that begins with these."""
        return Record(tokens, self._most, None if self._share is None else 1 + self._most / 2)

    def grant(self, records: Sequence[Record]) -> Grant | None:
        """The step that promises most, or None where none pays.

        Args:
            records: of all texts of a call.
        """
        texts, found, fastest = len(records), None, 1.0
        if texts >= self._shapes.slots or not self.ledger.open:
            return None
        for record in records:
            record.follow()
        usual = self._shapes.cost(fitting(self._shapes.rows, texts))
        by_worth = sorted(range(texts), key=lambda i: -records[i].worth)
        by_worth = [i for i in by_worth if records[i].worth > 1 + OVERHEAD and not records[i].tried]
        for size in self._shapes.rows:
            if (spare := size - texts) < 1 or not by_worth:
                continue
            best = by_worth[: max(1, spare // FEW)]
            trial = not all(records[i].proven for i in best)
            most = min(self._most, FEW) if trial else self._most
            each = min(most, spare // len(best))
            cost = self._shapes.cost(size) / usual + (self._share or 0) * (most + 1)
            gained = sum(min(records[i].worth - 1, each) for i in best)
            pays = gained >= texts * (MARGIN * (cost - 1) + OVERHEAD)
            if pays and (speed := (1 + gained / texts) / cost) > fastest:
                widths = [1 + each * (i in best) for i in range(texts)]
                found, fastest = Grant(size, widths, cost, most, trial), speed
        if found is not None and found.trial:
            for record, width in zip(records, found.widths, strict=True):
                record.tried = width > 1
        return found
