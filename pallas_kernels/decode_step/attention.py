"""Attention inside a step: one row and key/value head to a block, or to several for a long text.

Eight warps take a run of slots each and keep a running softmax for all query heads of the group.
Keys and values go from memory straight to the tensor cores. The new token is the last slot.
"""

import dataclasses

from pallas_kernels.decode_step import thread as t
from pallas_kernels.decode_step import words as w
from pallas_kernels.decode_step.packing import WARPS
from pallas_kernels.decode_step.plan import Plan
from pallas_kernels.decode_step.products import THREADS
from pallas_kernels.decode_step.softmax import NEVER, Found, Softmax
from pallas_kernels.decode_step.thread import V
from pallas_kernels.decode_step.words import Layout, awaited, leave, over

SLOTS_A_SPLIT = 512
"""Slots from which on it pays to have one more block attend."""
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

    @property
    def _of_group(self) -> Found:
        return Found(self.found, self.plan.shape.group, self.plan.shape.head_dim)

    def _position(self, row: V) -> V:
        return t.load_global(self.positions + (row << 2).wide())[0]

    def _active(self, position: V) -> V:
        """Blocks that share a text."""
        wanted = (position + (SLOTS_A_SPLIT - 1)) // SLOTS_A_SPLIT
        return t.larger(t.smaller(wanted, self.splits), 1)

    def prefetch(self, layer: V) -> None:
        """Brings the first keys and values of each warp nearer, while the queries are made."""
        shape = self.plan.shape
        row, _, unit, split = self._mine()
        position = self._position(row)
        active = self._active(position)

        def bring() -> None:
            begin, end = self._run(split, position, active)
            lines = shape.head_dim // 64  # of 128 bytes, in a slot
            slot = begin + (t.me() % t.WARP) // lines
            at = ((slot * lines + (t.me() % t.WARP) % lines) << 7).wide()

            def lines_of_both() -> None:
                for which in range(2):
                    t.prefetch(self._cached(which, layer, unit) + at)

            t.when((slot < end) & (slot < position), lines_of_both)

        t.when(split < active, bring)

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
        return self.cache + index.wide() * (self.capacity * shape.head_dim * 2)

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
            both = t.bfloat16_pair(a, b)
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
        at_once = 2048 // h  # so many that their loads fit the registers
        lane = t.me() % t.WARP
        g, quarter = lane // 4, lane % 4
        queries = [
            t.load_shared(self.heads + (g * h + 32 * i + quarter * 8) * 2, 4, g < shape.group)
            for i in range(h // 32)
        ]
        begin, end = self._run(split, position, active)
        keys, values = (self._cached(which, layer, unit) for which in range(2))

        def tile(i: V, carry: list[V]) -> list[V]:
            first = begin + i * at_once

            def there(slot: V) -> V:
                return first + slot < end

            def load(which: int, slot: V, column: V) -> list[V]:
                """From the cache, or for the new token from where its head was put."""
                at = first + slot
                old = (keys, values)[which] + ((at * h + column) << 1).wide()
                new = t.anywhere(self.heads + ((shape.group + which) * h + column) * 2)
                source = t.select(at.equals(position), new, old)
                return t.load_global_where(there(slot), source, 4, "anywhere")

            found = Softmax.carried(carry).over(
                at_once,
                queries,
                lambda slot, i: load(0, slot, quarter * 8 + 32 * i),
                lambda slot, i: load(1, slot, g * 8 + 64 * i),
                there,
            )
            return found.carry()

        tiles = (t.larger(end - begin, 0) + (at_once - 1)) // at_once
        return Softmax.carried(t.loop(tiles, Softmax.empty(h).carry(), tile))

    def _leave(self, row: V, kv_head: V, split: V, active: V, tag: V) -> None:
        shape = self.plan.shape
        h, group = shape.head_dim, shape.group

        def number(item: V) -> None:
            head, column = item // h, item % h
            maximum, total, value = self._of_group.merged(head, column)
            index = row * shape.heads + kv_head * group + head

            def whole() -> None:
                at = self.layout.at(self.memory, w.ATTENDED, index * h + column)
                leave(at, value * t.reciprocal(total), tag)

            def part() -> None:
                place = index * self.splits + split
                leave(self.layout.at(self.memory, w.SPLITS, place * h + column), value, tag)

                def stats() -> None:
                    for n, stat in enumerate((maximum, total)):
                        leave(self.layout.at(self.memory, w.STATS, place * 2 + n), stat, tag)

                t.when(column.equals(0), stats)

            t.when(active.equals(1), whole)
            if self.splits > 1:
                t.when(active > 1, part)

        over(group * h, THREADS, number)

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
            _, total, value = of_head.merged(head, column)
            at = self.layout.at(self.memory, w.ATTENDED, index * h + column)
            leave(at, value * t.reciprocal(total), tag)

        t.when(t.me() < h, write)
        t.together(THREADS)
