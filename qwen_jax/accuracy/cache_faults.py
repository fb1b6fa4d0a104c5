"""How caches go wrong: each fault is a change of the rules in `cache_slots`."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from qwen_jax.accuracy.cache_slots import Call, Rules


@dataclasses.dataclass(frozen=True)
class CacheFault:
    """A fault of a cache: its name, a line for a reader, its row in the catalogue of known ones."""

    name: str
    line: str
    rules: Rules
    reference: str = ""


def _decode(new: Callable[[Call, int], Any], old: Callable[[Call, int], Any]) -> Callable:
    return lambda call, p: new(call, p) if call.decode else old(call, p)


def _prefill(new: Callable[[Call, int], Any], old: Callable[[Call, int], Any]) -> Callable:
    return lambda call, p: old(call, p) if call.decode else new(call, p)


RIGHT = Rules()


def _positions(place: Callable[[Call, int], int]) -> Rules:
    return Rules(query=place, key=place)


def _edge(block: int) -> Callable[[Call, int], Iterable[int]]:
    return lambda call, p: range(max(call.valid // block * block, 1))


_AFTER = _decode(lambda call, p: p + 1, RIGHT.query)

FAULTS = (
    CacheFault(
        "mask-top-left",
        "later chunks see slots as if they stood first: the causal mask is aligned top-left",
        Rules(seen=_prefill(lambda c, p: range(min(p - c.start + 1, c.valid)), RIGHT.seen)),
        "21",
    ),
    CacheFault(
        "mask-missing",
        "prefill sees later tokens of its own call",
        Rules(seen=_prefill(lambda c, p: range(c.valid), RIGHT.seen)),
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
        Rules(
            slot=_decode(lambda c, p: p + 1, RIGHT.slot),
            query=_AFTER,
            key=_AFTER,
            seen=_decode(lambda c, p: range(p + 2), RIGHT.seen),
        ),
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
        Rules(seen=_decode(lambda c, p: range(max(p + 1, len(c.scenario.before))), RIGHT.seen)),
        "25",
    ),
    CacheFault(
        "unused-slots-seen",
        "decoding sees the whole cache, written or not",
        Rules(seen=_decode(lambda c, p: range(c.scenario.capacity), RIGHT.seen)),
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
        Rules(slot=lambda c, p: min(p, c.scenario.capacity - 1)),
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
        "padded-left",
        "padding stands before the shorter prompts of a batch, and is seen",
        Rules(left=True),
        "34",
    ),
    CacheFault(
        "padding-seen",
        "the shorter prompts of a batch go on behind their padding, and see it",
        Rules(kept=True),
        "34",
    ),
    CacheFault(
        "last-column",
        "the prediction after a shorter prompt is that after its padding",
        Rules(last_column=True),
        "34",
    ),
)
"""Every fault of the cache that the audit can name."""
