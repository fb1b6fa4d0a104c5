"""What the blocks of a row find together: each block puts its warps' parts together and leaves the
result in the shared memory of every block of the cluster, which then meet."""

import dataclasses
from collections.abc import Callable, Sequence

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V
from pallas_kernels.sample_tokens import instructions as i
from pallas_kernels.sample_tokens.scores import THREADS

WARPS = THREADS // t.WARP
ALL = (16, 8, 4, 2, 1)
"""What the numbers of a warp's lanes differ in."""

FOUND, SEARCHED, DRAWN = range(2, 5)
"""Slots; the first two are for the best tokens of a row's two rounds."""
SLOTS = 5
VALUES = 8
"""Numbers of 64 bits that a meeting is about, at most."""
PARTS = 8 * VALUES * WARPS
"""Bytes of the warps' parts; those of the blocks follow."""
MOST_BLOCKS = 8
"""Of a cluster, on any Hopper GPU."""
SLOT_BYTES = PARTS + 8 * VALUES * MOST_BLOCKS

Combine = Callable[[list[V], list[V]], list[V]]


def added(a: list[V], b: list[V]) -> list[V]:
    return [x + y for x, y in zip(a, b, strict=True)]


def better(a: list[V], b: list[V]) -> list[V]:
    """Of two (score, id), the higher score, of equal ones the lower id."""
    wins = (b[0] > a[0]) | (b[0].equals(a[0]) & (b[1] < a[1]))
    return [t.select(wins, y, x) for x, y in zip(a, b, strict=True)]


def among(count: int) -> list[int]:
    """What the numbers of so many lanes differ in, the first of a warp."""
    return [mask for mask in ALL if mask < count]


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Of the `blocks` of a cluster, with `SLOTS` slots of shared memory, `SLOT_BYTES` each.

    A slot may be used again once the blocks have met elsewhere.
    """

    blocks: int
    rank: V
    slots: V

    def of(self, slot: int | V, values: Sequence[V], combine: Combine) -> list[V]:
        """What the values of all threads come to."""
        base = self.slots + t.integer(slot) * SLOT_BYTES
        lane, warp = t.thread_id() & 31, t.thread_id() >> 5
        mine = i.butterfly(values, combine, ALL)
        t.when(lane.equals(0), lambda: self._leave(base, warp, WARPS, mine))
        t.block_barrier(THREADS)

        def tell() -> None:
            parts = self._read(base, lane & (WARPS - 1), WARPS, values)
            block = i.butterfly(parts, combine, among(WARPS))
            there = i.remote(base + PARTS, lane & (self.blocks - 1))
            t.when(lane < self.blocks, lambda: self._tell(there, block))

        t.when(warp.equals(0), tell)
        i.cluster_barrier()
        found = self._read(base + PARTS, lane & (self.blocks - 1), MOST_BLOCKS, values)
        return i.butterfly(found, combine, among(self.blocks))

    @staticmethod
    def _leave(base: V, at: V, count: int, values: Sequence[V]) -> None:
        for n, value in enumerate(values):
            t.store_shared(base + (at << 3) + 8 * count * n, _halves(value))

    def _tell(self, there: V, values: Sequence[V]) -> None:
        for n, value in enumerate(values):
            place = there + (self.rank << 3) + 8 * MOST_BLOCKS * n
            for half, word in enumerate(_halves(value)):
                i.store_remote(place + 4 * half, word)

    @staticmethod
    def _read(base: V, at: V, count: int, like: Sequence[V]) -> list[V]:
        out = []
        for n, value in enumerate(like):
            place = base + (at << 3) + 8 * count * n
            if value.raw.type == t.i64():
                out.append(i.pair(*t.load_shared(place, 2)))
            else:
                (word,) = t.load_shared(place)
                out.append(word.bits() if value._is_float else word)
        return out


def _halves(value: V) -> list[V]:
    if value.raw.type == t.i64():
        return list(i.apart(value))
    return [value.bits() if value._is_float else value]
