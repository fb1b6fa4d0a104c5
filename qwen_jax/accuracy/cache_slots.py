"""What a cache holds and who sees it: a text's way through an engine's cache, in symbols.

An entry is one token computed once: it has a key and a value, stands in a slot until another entry
is written there, and sees the entries that stand in some slots at that time. Whoever follows the
rules of a cache gets entries that see exactly the tokens before them. A fault is a change of rule.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Row:
    """A text; `prompt` tokens of it are prefilled and the others decoded one by one."""

    tokens: tuple[int, ...]
    prompt: int


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How texts go through one cache.

    Attributes:
        rows: texts that run together.
        chunks: lengths of the prefill's calls, padding included; they cover every prompt.
        capacity: slots of the cache.
        before: a text that the same cache has held earlier.
        poisoned: unwritten slots hold NaN, not zero.
        idle: decode steps that a row takes part in after its end.
    """

    name: str
    rows: tuple[Row, ...]
    chunks: tuple[int, ...]
    capacity: int
    before: tuple[int, ...] = ()
    poisoned: bool = False
    idle: int = 0

    @property
    def longest(self) -> int:
        return max(row.prompt for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the engine as one row lives through it.

    Attributes:
        length: tokens, padding included.
        valid: tokens the row has once the call is in.
        decode: it is a decode step.
    """

    scenario: Scenario
    row: Row
    start: int
    length: int
    valid: int
    decode: bool


Place = Callable[[Call, int], int]


def _itself(call: Call, p: int) -> int:
    return p


def _inside(call: Call, p: int) -> int | None:
    return p if p < call.scenario.capacity else None


def _causal(call: Call, p: int) -> Iterable[int]:
    return range(min(p + 1, call.valid, call.scenario.capacity))


@dataclasses.dataclass(frozen=True)
class Rules:
    """Of token p of a call; as they stand, they are right.

    Attributes:
        slot: where its key and value go; None for nowhere.
        query, key: the rotary position of each.
        seen: the slots it sees.
        left: padding of a batch's prompts stands on the left and is seen.
        kept: padding on the right is kept and seen when decoding goes on behind it.
        last_column: the prediction after a prompt is read off the batch's last column.
    """

    slot: Callable[[Call, int], int | None] = _inside
    query: Place = _itself
    key: Place = _itself
    seen: Callable[[Call, int], Iterable[int]] = _causal
    left: bool = False
    kept: bool = False
    last_column: bool = False


@dataclasses.dataclass(frozen=True)
class Entries:
    """All tokens computed, E with one more for what an unwritten slot holds, the last.

    Attributes:
        sees: how many slots hold entry f when entry e looks, [e, f].
        output: of each position of the text, the entry whose logits come after it; -1: unknown.
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
        kept = np.zeros(len(self.tokens), bool)
        kept[self.output], kept[self.slots], kept[-1] = True, True, True
        while (more := kept | (self.sees[kept] > 0).any(axis=0)).sum() > kept.sum():
            kept = more
        number = np.cumsum(kept) - 1
        return dataclasses.replace(
            self,
            tokens=self.tokens[kept],
            query=self.query[kept],
            key=self.key[kept],
            sees=self.sees[np.ix_(kept, kept)],
            output=np.where(self.output < 0, -1, number[self.output]),
            slots=number[self.slots],
        )


def _calls(scenario: Scenario, row: Row, rules: Rules) -> Iterator[tuple[Call, Sequence[int]]]:
    """Each call with the tokens that go in, zeros for padding."""
    shift = scenario.longest - row.prompt if rules.left or rules.kept else 0
    valid = scenario.longest if rules.left or rules.kept else row.prompt
    text = [0] * shift + list(row.tokens[: row.prompt]) if rules.left else row.tokens[: row.prompt]
    if scenario.before:
        total = len(scenario.before)
        yield Call(scenario, row, 0, total, total, False), scenario.before
    start = 0
    for length in scenario.chunks:
        part = list(text[start : start + length])
        part += [0] * (length - len(part))
        reached = min(valid, start + length)
        yield Call(scenario, row, start, length, reached, False), part
        start += length
    for p in range(row.prompt, len(row.tokens)):
        at = p + shift
        yield Call(scenario, row, at, 1, at + 1, True), [row.tokens[p]]
    for _ in range(scenario.idle):
        at = scenario.capacity
        yield Call(scenario, row, at, 1, at + 1, True), [row.tokens[-1]]


def simulate(scenario: Scenario, row: Row, rules: Rules | None = None) -> Entries:
    """The entries of one row under some rules."""
    rules = rules or Rules()
    slots = np.full(scenario.capacity, -1)  # -1 is the last entry
    tokens: list[int] = []
    query: list[int] = []
    key: list[int] = []
    seen: list[np.ndarray] = []
    output = np.full(len(row.tokens), -1)
    calls = list(_calls(scenario, row, rules))
    for index, (call, part) in enumerate(calls):
        positions = range(call.start, call.start + len(part))
        entries = range(len(tokens), len(tokens) + len(part))
        tokens += part
        query += [rules.query(call, p) for p in positions]
        key += [rules.key(call, p) for p in positions]
        for p, entry in zip(positions, entries, strict=True):
            slot = rules.slot(call, p)
            if slot is not None and slot < scenario.capacity:
                slots[slot] = entry
        for p, entry in zip(positions, entries, strict=True):
            # Keys are written before any query of the call looks.
            seen.append(slots[[s for s in rules.seen(call, p) if s < scenario.capacity]])
            if index > 0 or not scenario.before:
                _predict(output, rules, call, p, entry)
    count = len(tokens) + 1
    sees = np.zeros((count, count))
    for entry, held in enumerate(seen):
        np.add.at(sees[entry], held, 1)
        if not held.size:  # such a query means nothing; here it is finite
            sees[entry, entry] = 1
    sees[-1, -1] = 1
    return Entries(
        np.array([*tokens, 0]),
        np.array([*query, 0]),
        np.array([*key, 0]),
        sees,
        output,
        slots[: len(row.tokens)] % count,
        scenario.poisoned,
    )


def _predict(output: np.ndarray, rules: Rules, call: Call, p: int, entry: int) -> None:
    """Notes the position of the text, if any, after which this entry predicts."""
    row, longest = call.row, call.scenario.longest
    moved = longest - row.prompt if rules.left or (rules.kept and call.decode) else 0
    at = p - moved
    if 0 <= at < (len(row.tokens) if call.decode else row.prompt) and p < call.scenario.capacity:
        output[at] = entry
    if rules.last_column and not call.decode and p == longest - 1:
        output[row.prompt - 1] = entry
