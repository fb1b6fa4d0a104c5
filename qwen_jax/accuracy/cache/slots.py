"""What a cache holds and who sees it: texts' ways through an engine's cache, in symbols.

An entry is one token computed once: it has a key and a value, stands in a slot of a page until
another entry is written there, and sees the entries that stand in some slots at that time. Whoever
follows the rules of a cache gets entries that see exactly the tokens before them. A fault is a
change of rule.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from qwen_jax.model.cache import NOBODY, PAGE

EMPTY = -1
"""The entry that an unwritten slot holds: the last one."""

WIDTH = 3
"""Pages of a table,"""

POOL = 7
"""and of the pool, the one of nobody among them: so all scenarios share an engine's programs."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A text and its places.

    Attributes:
        tokens: its ids.
        prompt: so many of them enter in pieces, and the others in steps, one by one.
        pages: its block table.
        slot: of the engine's state.
        shared: positions of its first pages that a row before it has filled.
        gone: others take its pages before the end, so nothing of it is looked at.
    """

    tokens: tuple[int, ...]
    prompt: int
    pages: tuple[int, ...] = (1, 2, 3)
    slot: int = 0
    shared: int = 0
    gone: bool = False

    @property
    def capacity(self) -> int:
        return PAGE * len(self.pages)


@dataclasses.dataclass(frozen=True)
class Part:
    """What a row does in one call of the engine.

    Attributes:
        row: its number.
        start: the position of its first token.
        length: tokens; 0 where it only stands by.
        padded: with padding.
        decode: it is a decode step.
    """

    row: int
    start: int
    length: int
    padded: int
    decode: bool = False


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How texts go through one cache.

    Attributes:
        rows: the texts.
        calls: the parts of each call, in order.
        poisoned: unwritten slots hold NaN, not zero.
    """

    name: str
    rows: tuple[Row, ...]
    calls: tuple[tuple[Part, ...], ...]
    poisoned: bool = False

    @property
    def decodes(self) -> bool:
        return any(part.decode for call in self.calls for part in call)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call as one of its rows lives through it.

    Attributes:
        parts: of all rows.
        part: its own.
    """

    scenario: Scenario
    parts: tuple[Part, ...]
    part: Part

    @property
    def row(self) -> Row:
        return self.scenario.rows[self.part.row]

    @property
    def start(self) -> int:
        return self.part.start

    @property
    def valid(self) -> int:
        """Tokens the row has once the call is in."""
        return self.part.start + self.part.length

    @property
    def decode(self) -> bool:
        return self.part.decode

    @property
    def before(self) -> Row | None:
        """The text that had the row's slot before it."""
        earlier = self.scenario.rows[: self.part.row]
        return next((row for row in reversed(earlier) if row.slot == self.row.slot), None)


Place = Callable[[Call, int], int]


def itself(call: Call, p: int) -> int:
    return p


def kept(call: Call, p: int) -> int | None:
    return p if p < min(call.valid, call.row.capacity) else None


def causal(call: Call, p: int) -> int:
    return min(p + 1, call.valid)


def own_page(call: Call, p: int) -> int:
    return call.row.pages[p // PAGE]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Of token p of a call; as they stand, they are right.

    Attributes:
        slot: the position where its key and value go; None for nowhere.
        query, key: the rotary position of each.
        seen: it sees so many positions, from the first on.
        writes, reads: the page where a position is written; where those from p on are read.
        blind: pieces of one call don't see what the others write.
        padding: a prompt's padding is kept, and the text goes on behind it.
    """

    slot: Callable[[Call, int], int | None] = kept
    query: Place = itself
    key: Place = itself
    seen: Place = causal
    writes: Place = own_page
    reads: Place = own_page
    blind: bool = False
    padding: bool = False


@dataclasses.dataclass(frozen=True)
class Entries:
    """The tokens that one row's text depends on, E with one more for what an unwritten slot holds,
    the last.

    Attributes:
        sees: how many slots hold entry f when entry e looks, [e, f].
        output: of each position of the text, the entry whose logits come after it; -1: none.
        slots: the entry that each slot of the text holds at the end.
        poisoned: unwritten slots hold NaN, not zero.
    """

    tokens: Int[np.ndarray, "E"]
    query: Int[np.ndarray, "E"]
    key: Int[np.ndarray, "E"]
    sees: Float[np.ndarray, "E E"]
    output: Int[np.ndarray, "T"]
    slots: Int[np.ndarray, "T"]
    poisoned: bool

    def same(self, other: "Entries") -> bool:
        return all(
            np.array_equal(getattr(self, field), getattr(other, field))
            for field in ("tokens", "query", "key", "sees", "output", "slots")
        )

    def needed(self) -> "Entries":
        """Only those that a prediction or a slot of the text depends on."""
        chosen = np.zeros(len(self.tokens), bool)
        chosen[self.output[self.output >= 0]] = chosen[self.slots] = chosen[EMPTY] = True
        while (more := chosen | (self.sees[chosen] > 0).any(axis=0)).sum() > chosen.sum():
            chosen = more
        number = np.cumsum(chosen) - 1
        return dataclasses.replace(
            self,
            tokens=self.tokens[chosen],
            query=self.query[chosen],
            key=self.key[chosen],
            sees=self.sees[np.ix_(chosen, chosen)],
            output=np.where(self.output < 0, -1, number[self.output]),
            slots=number[self.slots],
        )


def simulate(scenario: Scenario, rules: Rules | None = None) -> list[Entries]:
    """The entries of each row under some rules."""
    run = _Run(scenario, rules or Rules())
    for parts in scenario.calls:
        run.call(parts)
    return [run.entries(number) for number in range(len(scenario.rows))]


class _Run:
    """A scenario under way.

    Attributes:
        held: the entry in each slot of every page.
        behind: of each row, tokens of padding that its text goes on behind.
    """

    def __init__(self, scenario: Scenario, rules: Rules):
        self.scenario, self.rules = scenario, rules
        self.held = np.full(POOL * PAGE, EMPTY)
        self.tokens: list[int] = []
        self.query: list[int] = []
        self.key: list[int] = []
        self.seen: list[np.ndarray] = []
        self.output = [np.full(len(row.tokens), -1) for row in scenario.rows]
        self.behind = [0] * len(scenario.rows)

    def call(self, parts: tuple[Part, ...]) -> None:
        """All parts write before any of them looks."""
        inputs = [self._inputs(part) for part in parts]
        before = self.held.copy()
        ruled = tuple(map(self._ruled, parts))
        views = [Call(self.scenario, ruled, part) for part in ruled]
        written = [self._write(view, ids) for view, ids in zip(views, inputs, strict=True)]
        for view, part, first in zip(views, parts, written, strict=True):
            held = self.held
            if self.rules.blind and not view.decode:
                own = (held >= first) & (held < first + part.padded)
                held = np.where(own, held, before)
            self._look(view, held)
            self.output[part.row][part.start : part.start + part.length] = range(
                first, first + part.length
            )

    def _inputs(self, part: Part) -> list[int]:
        """The tokens that go in, zeros for padding; who stands by has its last one still."""
        tokens = self.scenario.rows[part.row].tokens
        if part.length == 0:
            return [tokens[-1]]
        text = tokens[part.start : part.start + part.length]
        return [*text, *[0] * (part.padded - part.length)]

    def _ruled(self, part: Part) -> Part:
        """As it is where padding is kept."""
        if not self.rules.padding:
            return part
        if part.decode:
            return dataclasses.replace(part, start=part.start + self.behind[part.row])
        self.behind[part.row] = part.padded - part.length
        return dataclasses.replace(part, length=part.padded)

    def _write(self, call: Call, inputs: list[int]) -> int:
        """The number of the first of its entries, which hold their keys and values now."""
        first, rules = len(self.tokens), self.rules
        for entry, p in enumerate(range(call.start, call.start + len(inputs)), start=first):
            self.query.append(rules.query(call, p))
            self.key.append(rules.key(call, p))
            slot = rules.slot(call, p)
            if slot is not None and 0 <= slot < call.row.capacity:
                page = rules.writes(call, slot)
                if page != NOBODY:
                    self.held[page * PAGE + slot % PAGE] = entry
        self.tokens += inputs
        return first

    def _look(self, call: Call, held: Int[np.ndarray, " slots"]) -> None:
        starts = range(0, call.row.capacity, PAGE)
        pages = np.array([self.rules.reads(call, start) for start in starts])
        there = held[(pages[:, None] * PAGE + np.arange(PAGE)).ravel()]
        for p in range(call.start, call.start + call.part.padded):
            self.seen.append(there[: self.rules.seen(call, p)])

    def entries(self, number: int) -> Entries:
        """Those of one row, once all calls are done."""
        row, count = self.scenario.rows[number], len(self.tokens) + 1
        sees = np.zeros((count, count))
        for entry, held in enumerate(self.seen):
            sees[entry] = np.bincount(held % count, minlength=count)
            if not held.size:  # such a query means nothing; here it is finite
                sees[entry, entry] = 1
        sees[EMPTY, EMPTY] = 1
        at = np.arange(len(row.tokens))
        slots = self.held[np.array(row.pages)[at // PAGE] * PAGE + at % PAGE]
        everything = Entries(
            np.array([*self.tokens, 0]),
            np.array([*self.query, 0]),
            np.array([*self.key, 0]),
            sees,
            self.output[number],
            slots % count,
            self.scenario.poisoned,
        )
        return everything.needed()
