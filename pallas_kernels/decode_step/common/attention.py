"""Attention inside a step: one row and key/value head to a block, or to several for a long
context.

Eight warps take a run of slots each and keep a running softmax for all query heads of the group.
Keys and values go from memory straight to the registers of the tensor cores' operands, a turn
ahead. A turn's slots lie in one page, looked up while the queries or an earlier turn's keys are
waited for. The new token, which is in no slot yet, is one more part beside those of the warps; new
tokens before it, of other rows, are loaded as if they were in their slots.
"""

import dataclasses
from collections.abc import Callable

from pallas_kernels.decode_step.common.cache import PagedCache
from pallas_kernels.decode_step.common.exchange import Exchange, Section, poll, publish
from pallas_kernels.decode_step.common.heads import Heads, New
from pallas_kernels.decode_step.common.launch import THREADS
from pallas_kernels.decode_step.common.softmax import NEVER, Found, Softmax, score_scale
from pallas_kernels.decode_step.packed.plan import StepPlan
from pallas_kernels.decode_step.packed.tile import WARPS
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import Format
from pallas_kernels.decode_step.ptx.loops import block_stride_loop
from pallas_kernels.decode_step.ptx.thread import V

SLOTS_A_SPLIT = 128
"""Slots a block takes of a context that several attend to: one turn of its warps."""
SLOTS_ALONE = 256
"""Slots up to which it takes less time to attend to all of them than to put parts together."""
SLOTS_AT_ONCE = 16
"""Slots of a warp's turn. Runs begin at multiples of them, so that none lies across two pages."""
TURNS_EARLY = 2
"""Of which keys and values are asked for before the queries are there."""
SPLITS_AT_ONCE = 5
"""Splits of a warp that are polled together, at most."""


Result = Callable[[V, V, list[V], V, V], None]
"""Publishes some columns of a head's result: row and head in one number, the first column, the
values, the layer and its flag."""


def most_splits(plan: StepPlan, rows: int, capacity: int) -> int:
    """Blocks that can share one row and key/value head of a full cache."""
    units = rows * plan.shape.kv_heads
    return max(1, min(plan.blocks // units, -(-capacity // SLOTS_A_SPLIT)))


def found_bytes(plan: StepPlan) -> int:
    """What the warps find for the group, and the new token's part."""
    size = Found.size(plan.shape.group, plan.shape.head_dim, WARPS + 1)
    # What lies behind it is loaded by 16 bytes, and nine parts of seven heads are eight more.
    return -(-size // 16) * 16


def heads_bytes(plan: StepPlan) -> int:
    """The group's queries, the key and the value, in 16 bits."""
    return (plan.shape.group + 2) * plan.shape.head_dim * 2


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of one block.

    Attributes:
        splits: blocks for one row and key/value head, at most.
        cta: the block's number, and that of its first share.
        cache: keys and values of the slots before each row's position.
        rope, positions: addresses of the inputs.
        new: of the new keys and values.
        heads: shared memory for the group's queries, the key and the value.
        found: shared memory for what the warps found.
        format: of the cache.
        result: where the results go.
        several: whether rows may be several positions of one text, of which behind all positions
            stands how many rows before a row are its text's.
        early: bytes of a layer's keys and values, were all rows as long as one, up to which its
            first are asked for early; more would be in the way of what others wait for.
    """

    plan: StepPlan
    rows: int
    splits: int
    cta: V
    cache: PagedCache
    rope: V
    positions: V
    new: V
    exchange: Exchange
    heads: V
    found: V
    format: Format
    result: Result
    early: int
    several: bool = False

    @property
    def _at_once(self) -> int:
        """Splits of a warp that are polled together."""
        of_warp = -(-self.splits // WARPS)
        return -(-of_warp // -(-of_warp // SPLITS_AT_ONCE))

    @property
    def _of_group(self) -> Found:
        return Found(self.found, self.plan.shape.group, self.plan.shape.head_dim, WARPS + 1)

    @property
    def _heads(self) -> Heads:
        return Heads(
            self.plan, self.rows, self.rope, self.new, self.exchange, self.heads, self.format
        )

    def _position(self, row: V) -> V:
        return t.load_global(self.positions + (row << 2).wide())[0]

    def _preceding(self, row: V) -> V:
        """How many rows before a row are its text's preceding positions."""
        return t.load_global(self.positions + ((row + self.rows) << 2).wide())[0]

    def _active(self, position: V) -> V:
        """Blocks that share a row's context."""
        several = t.smaller((position + (SLOTS_A_SPLIT - 1)) // SLOTS_A_SPLIT, self.splits)
        return t.select(position <= SLOTS_ALONE, t.integer(1), several)

    def prefetch(self, layer: V) -> None:
        """Brings each warp's first keys and values nearer while the queries are made."""
        row, kv_head, split = self._share(self.cta)
        position = self._position(row)
        active = self._active(position)
        of_slot = self.rows * self.plan.shape.kv_heads * 2 * self.cache.slot_bytes
        wanted = (split < active) & (position <= self.early // of_slot)
        lane = t.thread_id() % t.WARP

        def bring() -> None:
            """A lane for the keys of each turn, and one for the values."""
            begin, end = self._run(split, position, active)
            if self.several:  # what follows is not in the cache yet
                end = t.smaller(end, position - self._preceding(row))
            first = begin + lane // 2 * SLOTS_AT_ONCE

            def these() -> None:
                size = (t.smaller(first + SLOTS_AT_ONCE, end) - first) * self.cache.slot_bytes
                at = self.cache.key(layer, kv_head, self.cache.page(row, first), first)
                t.prefetch(at + (lane % 2).wide() * self.cache.values, size)

            t.when(first < end, these)

        t.when(wanted & (lane < 2 * TURNS_EARLY), bring)

    def _share(self, number: V) -> tuple[V, V, V]:
        """Row, key/value head and split of the share of this number."""
        kv_heads = self.plan.shape.kv_heads
        units = self.rows * kv_heads
        unit, split = number % units, number // units
        return unit // kv_heads, unit % kv_heads, split

    def _run(self, split: V, position: V, active: V) -> tuple[V, V]:
        """This warp's slots, from the first to the one after the last."""
        warps, warp = active * WARPS, split * WARPS + t.thread_id() // t.WARP
        turns = (position + (SLOTS_AT_ONCE - 1)) // SLOTS_AT_ONCE
        begin, end = (number * turns // warps * SLOTS_AT_ONCE for number in (warp, warp + 1))
        return begin, t.smaller(end, position)

    def _spot(self, run: tuple[V, V], turn: V) -> tuple[V, V]:
        """A turn's first slot and how many of the run follow; after its end, its last slot."""
        begin, end = run
        last = t.larger(end - 1, 0)
        first = t.smaller(begin + turn * SLOTS_AT_ONCE, last)
        return first, last - first

    def attend(self, layer: V, flag: V) -> None:
        """Attention of every row, key/value head and split that is this block's turn.

        What it finds is published for everyone, or for `combine`.
        """
        blocks = self.plan.blocks
        shares = self.rows * self.plan.shape.kv_heads * self.splits

        def turn(i: V, _: list[V]) -> list[V]:
            self._attend(self.cta + i * blocks, layer, flag)
            return []

        t.loop(-(-shares // blocks), [], turn)

    def _attend(self, number: V, layer: V, flag: V) -> None:
        row, kv_head, split = self._share(number)
        position = self._position(row)
        active = self._active(position)

        def share() -> None:
            begin, end = run = self._run(split, position, active)
            page = self.cache.page(row, self._spot(run, t.integer(0))[0])
            # The row of an empty run may have no page; page 0 is always there.
            page = t.select(begin < end, page, 0)
            heads = self._heads
            heads.take(layer, row, kv_head, split, flag)
            new = None
            if self.several:
                new = heads.take_preceding(
                    layer, row, kv_head, position, self._preceding(row), flag
                )
            t.block_barrier(THREADS)
            # Not before: they would be in the way of the words that are polled.
            first = self._load(layer, kv_head, run, t.integer(0), page, new)
            self._new_token(split)
            self._of_group.keep(self._slots(layer, row, kv_head, run, first, new))
            t.block_barrier(THREADS)
            self._publish(row, kv_head, split, active, layer, flag)
            t.block_barrier(THREADS)

        t.when(split < active, share)

    def _new_token(self, split: V) -> None:
        """The new token's part: each warp finds its score for one head.

        Of several splits the first counts it; in the others it weighs nothing.
        """
        h, group, part = self.plan.shape.head_dim, self.plan.shape.group, WARPS
        head, lane = t.thread_id() // t.WARP, t.thread_id() % t.WARP

        def numbers(of: V | int) -> list[V]:
            """A lane's share of a query, or of the key or value after them."""
            at = self.heads + of * (2 * h) + lane * (h // 16)
            return [x for word in t.load_shared(at, h // 64) for x in self.format.floats(word)]

        def score() -> None:
            products = [q * k for q, k in zip(numbers(head), numbers(group), strict=True)]
            total = t.warp_sum(sum(products[1:], start=products[0])) * score_scale(h)
            mine = split.equals(0)
            stats = [t.select(mine, total, NEVER), t.select(mine, t.number(1), 0.0)]
            at = self._of_group.stats(part, head)
            t.when(lane.equals(0), lambda: t.store_shared(at, stats))
            value = self._of_group.value(part, head, lane * (h // 32))
            t.store_shared(value, numbers(group + 1))

        t.when(head < group, score)

    def _load(
        self, layer: V, kv_head: V, run: tuple[V, V], turn: V, page: V, new: New | None
    ) -> list[V]:
        """This lane's words of 16 slots of a run, in that page, which `_apart` takes apart.

        After the run's end they are those of its last slot. A load that might not take place would
        keep its registers occupied all the way from the kernel's start.
        """
        first, most = self._spot(run, turn)
        lane, slot_bytes = t.thread_id() % t.WARP, self.cache.slot_bytes
        g, quarter = lane // 4, lane % 4
        keys = self.cache.key(layer, kv_head, page, first)
        words, kind = [], "nc" if new is None else "block"
        # Keys of slots g and g + 8, values of slots 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
        for which, base, own, column, slots, stride in (
            (0, keys, g, quarter * 16, (0, 8), 64),
            (1, keys + self.cache.values, quarter * 2, g * 16, (0, 1, 8, 9), 128),
        ):
            for slot in slots:
                offset = t.smaller(own + slot, most)
                at = base + (offset * slot_bytes + column).wide()
                if new is not None:
                    at = new.instead(at, first + offset, which, column)
                for begin in range(0, slot_bytes, stride):
                    words += t.load_global(at, 4, kind, offset=begin)
        return words

    def _apart(self, words: list[V]) -> tuple[list[list[list[V]]], list[list[list[V]]]]:
        """Keys and values as `Softmax.over` takes them."""
        per_key, per_value = self.cache.slot_bytes // 64, self.cache.slot_bytes // 128
        fours = [words[n : n + 4] for n in range(0, len(words), 4)]
        keys, values = fours[: 2 * per_key], fours[2 * per_key :]
        slots = [values[n : n + per_value] for n in range(0, len(values), per_value)]
        return [keys[:per_key], keys[per_key:]], slots

    def _slots(
        self,
        layer: V,
        row: V,
        kv_head: V,
        run: tuple[V, V],
        loaded: list[V],
        new: New | None,
    ) -> Softmax:
        """The running softmax of this warp's slots, in one lane's share."""
        shape = self.plan.shape
        h = shape.head_dim
        lane = t.thread_id() % t.WARP
        g, quarter = lane // 4, lane % 4
        queries = [
            t.load_shared(self.heads + (g * h + 32 * i + quarter * 8) * 2, 4, g < shape.group)
            for i in range(h // 32)
        ]
        begin, end = run
        empty = Softmax.empty(h).carry()

        def turn(i: V, carry: list[V]) -> list[V]:
            # While this turn's keys are on their way.
            page = self.cache.page(row, self._spot(run, i + 1)[0])
            own = begin + i * SLOTS_AT_ONCE + g
            keys, values = self._apart(carry[len(empty) :])
            there = [own + slot < end for slot in (0, 8)]
            found = Softmax.carried(carry[: len(empty)])
            found = found.over(self.format, queries, keys, values, there)
            # Not before: now the registers of this turn's are free, or will be while it multiplies.
            return [*found.carry(), *self._load(layer, kv_head, run, i + 1, page, new)]

        turns = (t.larger(end - begin, 0) + (SLOTS_AT_ONCE - 1)) // SLOTS_AT_ONCE
        return Softmax.carried(t.loop(turns, [*empty, *loaded], turn)[: len(empty)])

    def _publish(self, row: V, kv_head: V, split: V, active: V, layer: V, flag: V) -> None:
        shape = self.plan.shape
        h, group = shape.head_dim, shape.group
        quads = h // 4

        def four(item: V) -> None:
            head, column = item // quads, item % quads * 4
            maximum, total, values = self._of_group.merged(head, column, 4)
            index = row * shape.heads + kv_head * group + head

            def whole() -> None:
                scale = t.reciprocal(total)
                self.result(index, column, [value * scale for value in values], layer, flag)

            def part() -> None:
                which = index * self.splits + split
                at = self.exchange.at(Section.SPLITS, which * h + column)
                publish(at, values, flag)
                at = self.exchange.at(Section.STATS, which * 2)
                t.when(column.equals(0), lambda: publish(at, [maximum, total], flag))

            t.when(active.equals(1), whole)
            if self.splits > 1:
                t.when(active > 1, part)

        block_stride_loop(group * quads, THREADS, four)

    def combine(self, layer: V, flag: V) -> None:
        """Puts together what the splits of a context found, head by head."""
        if self.splits == 1:
            return
        blocks, heads = self.plan.blocks, self.rows * self.plan.shape.heads

        def one(i: V, _: list[V]) -> list[V]:
            index = self.cta + i * blocks
            active = self._active(self._position(index // self.plan.shape.heads))
            t.when(active > 1, lambda: self._combine(index, active, layer, flag))
            return []

        t.loop((t.integer(heads) - self.cta + (blocks - 1)) // blocks, [], one)

    def _combine(self, index: V, active: V, layer: V, flag: V) -> None:
        h = self.plan.shape.head_dim
        each = h // t.WARP
        lane, warp = t.thread_id() % t.WARP, t.thread_id() // t.WARP

        def some(i: V, carry: list[V]) -> list[V]:
            wanted = [(i * self._at_once + n) * WARPS + warp for n in range(self._at_once)]
            at_splits = [index * self.splits + t.smaller(s, active - 1) for s in wanted]
            ats = []
            for at in at_splits:
                ats += [self.exchange.at(Section.STATS, at * 2 + n) for n in range(2)]
                first = at * h + lane
                ats += [self.exchange.at(Section.SPLITS, first + n * t.WARP) for n in range(each)]
            words = [word for (word,) in poll(ats, 1, flag)]
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

        stripe = WARPS * self._at_once
        none = [t.number(NEVER), *[t.number(0)] * (1 + each)]
        found = t.loop((active + (stripe - 1)) // stripe, none, some)
        of_head, head = Found(self.found, 1, h, WARPS), t.integer(0)
        for n, value in enumerate(found[2:]):
            t.store_shared(of_head.value(warp, head, lane + n * t.WARP), [value])
        at = of_head.stats(warp, head)
        t.when(lane.equals(0), lambda: t.store_shared(at, found[:2]))
        t.block_barrier(THREADS)

        def write() -> None:
            column = t.thread_id()
            _, total, (value,) = of_head.merged(head, column, 1)
            self.result(index, column, [value * t.reciprocal(total)], layer, flag)

        t.when(t.thread_id() < h, write)
        t.block_barrier(THREADS)
