"""What attention takes in: a group's queries, and the new keys and values."""

import dataclasses
import functools

from pallas_kernels.decode_step.common.exchange import Exchange, Section, poll
from pallas_kernels.decode_step.common.launch import THREADS
from pallas_kernels.decode_step.packed.plan import StepPlan
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import Format
from pallas_kernels.decode_step.ptx.loops import block_stride_loop
from pallas_kernels.decode_step.ptx.thread import V


@dataclasses.dataclass(frozen=True)
class New:
    """Where keys and values are that are not in the cache yet.

    Attributes:
        key: address of the row's own.
        position: the row's; so many slots are before it.
        count: of these the last ones, which are new.
        stride: bytes from a row's to those of the row after it.
        values: bytes from a key to its value.
    """

    key: V
    position: V
    count: V
    stride: int
    values: int

    def instead(self, at: V, slot: V, which: int, column: V) -> V:
        """That address of a slot's key, or of its value, or where the new one is.

        Args:
            which: 0 for the key, 1 for the value.
            column: bytes from its beginning.
        """
        back = self.position - slot
        there = self.key + which * self.values - (back * self.stride).wide() + column.wide()
        return t.select(back <= self.count, there, at)


@dataclasses.dataclass(frozen=True)
class Heads:
    """One block's.

    Attributes: as of `Attention`.
    """

    plan: StepPlan
    rows: int
    rope: V
    new: V
    exchange: Exchange
    heads: V
    format: Format

    def take(self, layer: V, row: V, kv_head: V, split: V, flag: V) -> None:
        """Rotates the group's queries and the key; they and the value are rounded and kept."""
        shape = self.plan.shape
        h, half, group = shape.head_dim, shape.head_dim // 2, shape.group

        def pair(item: V) -> None:
            head, i = item // half, item % half
            both = self._rotated(row, kv_head, head, i, flag)
            own = self.heads + (head * h + i) * 2
            t.store_shared_half(own, both)
            t.store_shared_half(own + h, both >> 16)
            write = functools.partial(self._write, layer, row, kv_head, head - group, i, both)
            t.when((head >= group) & split.equals(0), write)
            if record := self.exchange.record:
                index = (row * shape.heads + kv_head * group + head) * h + i
                keep = functools.partial(record.keep_query, layer, index, both, half)
                t.when((head < group) & split.equals(0), keep)

        block_stride_loop((group + 2) * half, THREADS, pair)

    def _rotated(self, row: V, kv_head: V, head: V, i: V, flag: V) -> V:
        """Numbers i and i + H/2 of one of a group's queries, its key or its value, in 16 bits."""
        shape = self.plan.shape
        h, half, group = shape.head_dim, shape.head_dim // 2, shape.group
        column = t.select(head < group, (kv_head * group + head) * h, 0)
        own = (shape.heads + kv_head + (head - group) * shape.kv_heads) * h
        column = t.select(head < group, column, own) + i
        index = row * shape.qkv + column
        at = [self.exchange.at(Section.QKV, index + n * half) for n in range(2)]
        angle = self.rope + ((row * h + i) << 2).wide()
        cos, sin = (t.load_global(angle + 4 * n * half)[0].bits() for n in range(2))
        (first,), (second,) = poll(at, 1, flag)
        turns = head <= group
        a = t.select(turns, first * cos - second * sin, first)
        b = t.select(turns, second * cos + first * sin, second)
        return self.format.pair(a, b)

    def _write(self, layer: V, row: V, kv_head: V, value: V, i: V, both: V) -> None:
        """Stores a row's new key, or its value."""
        shape = self.plan.shape
        cached = (value * shape.layers + layer) * self.rows + row
        at = self.new + (((cached * shape.kv_heads + kv_head) * shape.head_dim + i) << 1).wide()
        t.store_global_half(at, both)
        t.store_global_half(at + shape.head_dim, both >> 16)

    def take_preceding(self, layer: V, row: V, kv_head: V, position: V, count: V, flag: V) -> New:
        """New keys and values of so many rows before it, which are of its text.

        Their own blocks store the same bits in the same places. To wait for those takes longer than
        to do it again; and what a block has stored itself it may load after a barrier of its own.
        """
        shape = self.plan.shape
        half = shape.head_dim // 2

        def pair(item: V) -> None:
            other, value, i = row - 1 - item // (2 * half), item // half % 2, item % half
            both = self._rotated(other, kv_head, value + shape.group, i, flag)
            self._write(layer, other, kv_head, value, i, both)

        block_stride_loop(count * (2 * half), THREADS, pair)
        # Of the row's own position, in which none is.
        first = ((layer * self.rows + row) * shape.kv_heads + kv_head).wide()
        at = self.new + first * self._slot_bytes
        return New(at, position, count, self._slot_bytes * shape.kv_heads, self._values)

    @property
    def _values(self) -> int:
        """Bytes from a new key to its value."""
        shape = self.plan.shape
        return shape.layers * self.rows * shape.kv_heads * self._slot_bytes

    @property
    def _slot_bytes(self) -> int:
        return 2 * self.plan.shape.head_dim
