"""How caches go wrong: each fault is a change of the rules in `cache_slots`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from qwen_jax.accuracy.cache.slots import POOL, Call, Row, Rules
from qwen_jax.model.cache import NOBODY, PAGE


@dataclasses.dataclass(frozen=True)
class CacheFault:
    """A fault of a cache: its name, a line for a reader, its row in the catalogue of known ones."""

    name: str
    line: str
    rules: Rules
    reference: str = ""


RIGHT = Rules()


def _decode(new: Callable[[Call, int], Any], old: Callable[[Call, int], Any]) -> Callable:
    return lambda call, p: new(call, p) if call.decode else old(call, p)


def _prefill(new: Callable[[Call, int], Any], old: Callable[[Call, int], Any]) -> Callable:
    return lambda call, p: old(call, p) if call.decode else new(call, p)


def _positions(place: Callable[[Call, int], int]) -> Rules:
    return Rules(query=place, key=place)


def _moved(by: Callable[[Call], int]) -> Rules:
    """Decoded tokens as if they stood further on."""

    def place(call: Call, p: int) -> int:
        return p + by(call)

    return Rules(
        slot=_decode(place, RIGHT.slot),
        query=_decode(place, RIGHT.query),
        key=_decode(place, RIGHT.key),
        seen=_decode(lambda c, p: p + 1 + by(c), RIGHT.seen),
    )


def _edge(block: int) -> Callable[[Call, int], int]:
    return lambda call, p: max(call.valid // block * block, 1)


def _left_by(call: Call) -> Row:
    return call.before or call.row


def _in_table(row: Row, p: int) -> int:
    return row.pages[p // PAGE] if p < row.capacity else NOBODY


def _alike(call: Call, p: int) -> int:
    """A row that shares pages takes the next one of the same text too."""
    row = call.row
    return _in_table(call.scenario.rows[0] if 0 < row.shared == p // PAGE * PAGE else row, p)


_AFTER = _decode(lambda call, p: p + 1, RIGHT.query)

FAULTS = (
    CacheFault(
        "mask-top-left",
        "later chunks see slots as if they stood first: the causal mask is aligned top-left",
        Rules(seen=_prefill(lambda c, p: min(p - c.start + 1, c.valid), RIGHT.seen)),
        "21",
    ),
    CacheFault(
        "mask-missing",
        "prefill sees later tokens of its own call",
        Rules(seen=_prefill(lambda c, p: c.valid, RIGHT.seen)),
    ),
    CacheFault(
        "position-stuck",
        "every decoded token is rotated as the first one after the prompt",
        _positions(_decode(lambda c, p: c.row.prompt, RIGHT.query)),
        "22",
    ),
    CacheFault(
        "position-restarts",
        "rotary positions count from 0 in every call",
        _positions(lambda call, p: p - call.start),
        "22",
    ),
    CacheFault(
        "hole",
        "decoding leaves a slot empty, which is seen, and goes on one further",
        _moved(lambda c: 1),
        "23",
    ),
    CacheFault(
        "position-plus-one", "decoded tokens are rotated one too far", _positions(_AFTER), "23"
    ),
    CacheFault(
        "slot-off-by-one",
        "decoding writes each token over the one before it",
        Rules(slot=_decode(lambda c, p: p - 1, RIGHT.slot)),
        "23",
    ),
    CacheFault(
        "keys-share-position",
        "all keys of a prefill call are rotated by the position of its first",
        Rules(key=_prefill(lambda c, p: c.start, RIGHT.key)),
        "24",
    ),
    CacheFault(
        "stale-slots-seen",
        "decoding sees slots that an earlier text has left",
        Rules(seen=_decode(lambda c, p: max(p + 1, len(_left_by(c).tokens)), RIGHT.seen)),
        "25",
    ),
    CacheFault(
        "unused-slots-seen",
        "decoding sees all of its pages, written or not",
        Rules(seen=_decode(lambda c, p: c.row.capacity, RIGHT.seen)),
        "25",
    ),
    CacheFault(
        "write-lost",
        "keys and values of decoded tokens never reach the cache",
        Rules(slot=_decode(lambda c, p: None, RIGHT.slot)),
        "25",
    ),
    CacheFault(
        "write-clamped",
        "a write past the end lands in the last slot",
        Rules(slot=lambda c, p: min(p, c.row.capacity - 1)),
        "26",
    ),
    *(
        CacheFault(
            f"edge-block-{block}",
            f"decoding leaves out the last block of {block} slots where it is not full",
            Rules(seen=_decode(_edge(block), RIGHT.seen)),
            "27",
        )
        for block in (8, 16, 32, 64, 128)
    ),
    CacheFault(
        "padding-seen",
        "a text goes on behind the padding of its prompt, and sees it",
        Rules(padding=True),
        "34",
    ),
    CacheFault(
        "start-shared",
        "all rows of a call are rotated as the first one",
        _positions(lambda c, p: p - c.start + c.parts[0].start),
        "34",
    ),
    CacheFault(
        "last-page-whole",
        "decoding sees its last page to the end, written or not",
        Rules(seen=_decode(lambda c, p: -(-c.valid // PAGE) * PAGE, RIGHT.seen)),
        "25",
    ),
    CacheFault(
        "page-late",
        "decoding writes the first token of a page into the page before",
        Rules(writes=_decode(lambda c, p: c.row.pages[(p - 1) // PAGE], RIGHT.writes)),
    ),
    CacheFault(
        "table-ignored",
        "pages are read one after another from the text's first on, whatever its table says",
        Rules(reads=lambda c, p: min(c.row.pages[0] + p // PAGE, POOL - 1)),
    ),
    CacheFault(
        "table-of-first-row",
        "all rows of a call read the pages of the first one",
        Rules(reads=lambda c, p: _in_table(c.scenario.rows[c.parts[0].row], p)),
    ),
    CacheFault(
        "table-left-by-text",
        "decoding reads and writes the pages of the text that had the slot before",
        Rules(
            writes=_decode(lambda c, p: _in_table(_left_by(c), p), RIGHT.writes),
            reads=_decode(lambda c, p: _in_table(_left_by(c), p), RIGHT.reads),
        ),
    ),
    CacheFault(
        "count-left-by-text",
        "decoding goes on counting where the text that had the slot before has stopped",
        _moved(lambda c: len(c.before.tokens) - c.before.prompt if c.before else 0),
    ),
    CacheFault(
        "page-shared-too-far",
        "texts that begin alike share the page in which they part",
        Rules(writes=_alike, reads=_alike),
    ),
    CacheFault(
        "pieces-blind",
        "a piece of a text doesn't see the pieces before it in its own call",
        Rules(blind=True),
    ),
)
"""Every fault of the cache that the audit can name."""
