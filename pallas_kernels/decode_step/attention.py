"""Attention inside a step: one row and key/value head to a block, or to several for a long text.

Eight warps take a run of slots each and keep a running softmax for all query heads of the group.
Keys and values go from memory straight to the tensor cores. The new token is the last slot.
"""

import dataclasses

from pallas_kernels.decode_step import thread as t
from pallas_kernels.decode_step import words as w
from pallas_kernels.decode_step.formats import Format
from pallas_kernels.decode_step.packing import WARPS
from pallas_kernels.decode_step.plan import Plan
from pallas_kernels.decode_step.products import THREADS
from pallas_kernels.decode_step.softmax import NEVER, Found, Softmax
from pallas_kernels.decode_step.thread import V
from pallas_kernels.decode_step.words import Layout, awaited, leave, over

SLOTS_A_SPLIT = 128
"""Slots a block takes of a text that several attend to: one turn of its warps."""
SLOTS_ALONE = 256
"""Slots up to which it takes less time to attend to all of them than to put parts together."""
SLOTS_AT_ONCE = 16
FEW_BLOCKS = 8
"""Attending blocks up to which a warp asks for 8 KiB of keys and of values early; else for 4."""
AHEAD = 1
"""Turns of 16 slots by which a warp asks for keys and values before it loads them; with four, long
caches of eight rows take 5 to 30 % more."""
SPLITS_AT_ONCE = 4
"""Splits of a warp that are waited for together."""


def most_splits(plan: Plan, rows: int, capacity: int) -> int:
    """Blocks that can share one row and key/value head of a full cache."""
    units = rows * plan.shape.kv_heads
    return max(1, min(plan.blocks // units, -(-capacity // SLOTS_A_SPLIT)))


def heads_bytes(plan: Plan) -> int:
    """The group's queries, the key and the value, in 16 bits."""
    return (plan.shape.group + 2) * plan.shape.head_dim * 2


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of one block.

    Attributes:
        splits: blocks for one row and key/value head, at most.
        block: the block's number.
        cache, rope, positions: addresses of the inputs.
        new: of the new keys and values.
        memory, layout: the words blocks leave for each other.
        heads: shared memory for the group's queries, the key and the value.
        found: shared memory for what the warps found.
        format: of the cache.
    """

    plan: Plan
    rows: int
    capacity: int
    splits: int
    block: V
    cache: V
    rope: V
    positions: V
    new: V
    memory: V
    layout: Layout
    heads: V
    found: V
    format: Format

    @property
    def _of_group(self) -> Found:
        return Found(self.found, self.plan.shape.group, self.plan.shape.head_dim)

    def _position(self, row: V) -> V:
        return t.load_global(self.positions + (row << 2).wide())[0]

    def _active(self, position: V) -> V:
        """Blocks that share a text."""
        several = t.smaller(position // SLOTS_A_SPLIT + 1, self.splits)
        return t.select(position < SLOTS_ALONE, t.integer(1), several)

    def prefetch(self, layer: V) -> None:
        """Brings each warp's first keys and values nearer, while the queries are made."""
        row, _, unit, split = self._mine()
        position = self._position(row)
        active = self._active(position)

        def bring() -> None:
            begin, end = self._run(split, position, active)
            few = (active * (self.rows * self.plan.shape.kv_heads)) <= FEW_BLOCKS
            slots = 4096 // self._slot_bytes
            count = t.select(few, t.integer(2 * slots), slots)
            self._bring(layer, unit, begin, t.smaller(begin + count, t.smaller(end, position)))

        t.when((split < active) & (t.me() % t.WARP).equals(0), bring)

    def _bring(self, layer: V, unit: V, begin: V, end: V) -> None:
        """Asks for the keys and values of some slots."""

        def both() -> None:
            size = (end - begin) * self._slot_bytes
            for which in range(2):
                at = self._cached(which, layer, unit) + (begin * self._slot_bytes).wide()
                t.prefetch(at, size)

        t.when(begin < end, both)

    @property
    def _slot_bytes(self) -> int:
        return 2 * self.plan.shape.head_dim

    def _mine(self) -> tuple[V, V, V, V]:
        """Row, key/value head, both in one number, and split of this block."""
        units = self.rows * self.plan.shape.kv_heads
        unit, split = self.block % units, self.block // units
        return unit // self.plan.shape.kv_heads, unit % self.plan.shape.kv_heads, unit, split

    def _run(self, split: V, position: V, active: V) -> tuple[V, V]:
        """This warp's slots, from the first to the one after the last."""
        each = (position + active * WARPS) // (active * WARPS)
        begin = (split * WARPS + t.me() // t.WARP) * each
        return begin, t.smaller(begin + each, position + 1)

    def _cached(self, which: int, layer: V, unit: V) -> V:
        """Address of a head's keys (0) or values (1) in the cache."""
        shape = self.plan.shape
        index = (which * shape.layers + layer) * (self.rows * shape.kv_heads) + unit
        return self.cache + index.wide() * (self.capacity * self._slot_bytes)

    def attend(self, layer: V, tag: V) -> None:
        """This block's share of attention; its result is left for everyone, or for `combine`."""
        row, kv_head, unit, split = self._mine()
        row_position = self._position(row)
        active = self._active(row_position)

        def share() -> None:
            self._take_heads(layer, row, kv_head, split, tag)
            t.together(THREADS)
            self._of_group.keep(self._slots(layer, unit, split, row_position, active))
            t.together(THREADS)
            self._leave(row, kv_head, split, active, tag)
            t.together(THREADS)

        t.when(split < active, share)

    def _take_heads(self, layer: V, row: V, kv_head: V, split: V, tag: V) -> None:
        """Rotates the group's queries and the key; they and the value are rounded and kept."""
        shape = self.plan.shape
        h, half, group = shape.head_dim, shape.head_dim // 2, shape.group

        def pair(item: V) -> None:
            head, i = item // half, item % half
            column = t.select(head < group, (kv_head * group + head) * h, 0)
            own = (shape.heads + kv_head + (head - group) * shape.kv_heads) * h
            column = t.select(head < group, column, own) + i
            index = row * shape.qkv + column
            at = [self.layout.at(self.memory, w.QKV, index + n * half) for n in range(2)]
            angle = self.rope + ((row * h + i) << 2).wide()
            cos, sin = (t.load_global(angle + 4 * n * half)[0].bits() for n in range(2))
            (first,), (second,) = awaited(at, 1, tag)
            turns = head <= group
            a = t.select(turns, first * cos - second * sin, first)
            b = t.select(turns, second * cos + first * sin, second)
            both = self.format.pair(a, b)
            place = self.heads + (head * h + i) * 2
            t.store_shared_half(place, both)
            t.store_shared_half(place + h, both >> 16)

            def write() -> None:
                cached = ((head - group) * shape.layers + layer) * self.rows + row
                at = self.new + (((cached * shape.kv_heads + kv_head) * h + i) << 1).wide()
                t.store_global_half(at, both)
                t.store_global_half(at + h, both >> 16)

            t.when((head >= group) & split.equals(0), write)

        over((group + 2) * half, THREADS, pair)

    def _slots(self, layer: V, unit: V, split: V, position: V, active: V) -> Softmax:
        """The running softmax of this warp's slots, in one lane's share."""
        shape = self.plan.shape
        h = shape.head_dim
        lane = t.me() % t.WARP
        g, quarter = lane // 4, lane % 4
        queries = [
            t.load_shared(self.heads + (g * h + 32 * i + quarter * 8) * 2, 4, g < shape.group)
            for i in range(h // 32)
        ]
        begin, end = self._run(split, position, active)
        keys, values = (self._cached(which, layer, unit) for which in range(2))
        slot_bytes = self._slot_bytes
        # Of slot g, or 2 t, of the run, and of the new token, which is not in the cache yet.
        key = keys + ((begin + g) * slot_bytes + quarter * 16).wide()
        value = values + ((begin + quarter * 2) * slot_bytes + g * 16).wide()
        own = self.heads + shape.group * slot_bytes
        own_key = t.anywhere(own + quarter * 16)
        own_value = t.anywhere(own + slot_bytes + g * 16)

        def tile(i: V, carry: list[V]) -> list[V]:
            first = begin + i * SLOTS_AT_ONCE
            early = first + AHEAD * SLOTS_AT_ONCE
            until = t.smaller(early + SLOTS_AT_ONCE, t.smaller(end, position))
            t.when(lane.equals(0), lambda: self._bring(layer, unit, early, until))
            ahead = (i * (SLOTS_AT_ONCE * slot_bytes)).wide()

            def load(slot: V, base: V, new: V, offset: int, stride: int) -> list[list[V]]:
                at = t.select(slot.equals(position), new, base + ahead + offset)
                count = slot_bytes // stride
                return [
                    t.load_global(at, 4, "anywhere", where=slot < end, offset=n * stride)
                    for n in range(count)
                ]

            eights = range(0, SLOTS_AT_ONCE, 8)
            loaded_keys = [load(first + g + n, key, own_key, n * slot_bytes, 64) for n in eights]
            pairs = [[n, n + 1] for n in eights]
            slots = [[first + quarter * 2 + n for n in pair] for pair in pairs]
            loaded_values = [
                [
                    load(slot, value, own_value, n * slot_bytes, 128)
                    for slot, n in zip(both, pair, strict=True)
                ]
                for both, pair in zip(slots, pairs, strict=True)
            ]
            there = [[slot < end for slot in both] for both in slots]
            found = Softmax.carried(carry).over(
                self.format, queries, loaded_keys, loaded_values, there
            )
            return found.carry()

        tiles = (t.larger(end - begin, 0) + (SLOTS_AT_ONCE - 1)) // SLOTS_AT_ONCE
        return Softmax.carried(t.loop(tiles, Softmax.empty(h).carry(), tile))

    def _leave(self, row: V, kv_head: V, split: V, active: V, tag: V) -> None:
        shape = self.plan.shape
        h, group = shape.head_dim, shape.group
        quads = h // 4

        def four(item: V) -> None:
            head, column = item // quads, item % quads * 4
            maximum, total, values = self._of_group.merged(head, column, 4)
            index = row * shape.heads + kv_head * group + head

            def whole() -> None:
                at = self.layout.at(self.memory, w.ATTENDED, index * h + column)
                scale = t.reciprocal(total)
                leave(at, [value * scale for value in values], tag)

            def part() -> None:
                place = index * self.splits + split
                leave(self.layout.at(self.memory, w.SPLITS, place * h + column), values, tag)
                at = self.layout.at(self.memory, w.STATS, place * 2)
                t.when(column.equals(0), lambda: leave(at, [maximum, total], tag))

            t.when(active.equals(1), whole)
            if self.splits > 1:
                t.when(active > 1, part)

        over(group * quads, THREADS, four)

    def combine(self, tag: V) -> None:
        """Puts together what the splits of a text found, head by head."""
        if self.splits == 1:
            return
        blocks, heads = self.plan.blocks, self.rows * self.plan.shape.heads

        def one(i: V, _: list[V]) -> list[V]:
            index = self.block + i * blocks
            active = self._active(self._position(index // self.plan.shape.heads))
            t.when(active > 1, lambda: self._combine(index, active, tag))
            return []

        t.loop((t.integer(heads) - self.block + (blocks - 1)) // blocks, [], one)

    def _combine(self, index: V, active: V, tag: V) -> None:
        h = self.plan.shape.head_dim
        each = h // t.WARP
        lane, warp = t.me() % t.WARP, t.me() // t.WARP

        def some(i: V, carry: list[V]) -> list[V]:
            wanted = [(i * SPLITS_AT_ONCE + n) * WARPS + warp for n in range(SPLITS_AT_ONCE)]
            places = [index * self.splits + t.smaller(s, active - 1) for s in wanted]
            ats = []
            for place in places:
                ats += [self.layout.at(self.memory, w.STATS, place * 2 + n) for n in range(2)]
                first = place * h + lane
                ats += [
                    self.layout.at(self.memory, w.SPLITS, first + n * t.WARP) for n in range(each)
                ]
            words = [word for (word,) in awaited(ats, 1, tag)]
            maximum, total, *values = carry
            for n, s in enumerate(wanted):
                theirs, weight, *parts = words[n * (2 + each) : (n + 1) * (2 + each)]
                theirs = t.select(s < active, theirs, NEVER)
                new = t.larger(maximum, theirs)
                ours, shrink = t.exp2(maximum - new), t.exp2(theirs - new)
                shrink = t.select(s < active, shrink, 0.0)
                total = total * ours + weight * shrink
                values = [v * ours + p * shrink for v, p in zip(values, parts, strict=True)]
                maximum = new
            return [maximum, total, *values]

        stripe = WARPS * SPLITS_AT_ONCE
        none = [t.number(NEVER), *[t.number(0)] * (1 + each)]
        found = t.loop((active + (stripe - 1)) // stripe, none, some)
        of_head, head = Found(self.found, 1, h), t.integer(0)
        for n, value in enumerate(found[2:]):
            t.store_shared(of_head.value(warp, head, lane + n * t.WARP), [value])
        at = of_head.stats(warp, head)
        t.when(lane.equals(0), lambda: t.store_shared(at, found[:2]))
        t.together(THREADS)

        def write() -> None:
            column = t.me()
            _, total, (value,) = of_head.merged(head, column, 1)
            at = self.layout.at(self.memory, w.ATTENDED, index * h + column)
            leave(at, [value * t.reciprocal(total)], tag)

        t.when(t.me() < h, write)
        t.together(THREADS)
