"""Thread code on NumPy: what `decode_step/ptx/thread.py` emits for a GPU runs here instead.

A value is an array, a number for every thread of a block's role (those that compute, or some of
the warps beside them); a mask says which threads are at work. Every role of every block is a
thread of Python, of which one runs at a time and gives way wherever it waits, to another at random.
So it finds wrong numbers, words that are read too early or never come, memory past its array's end.
Threads of a role run in step, which would hide a missing barrier: shared memory therefore notes
which warp last read and wrote each word, and complains if another one meets it before a barrier.
Barriers that guard global memory, and fences, are not missed here; only a GPU shows those.
"""

import collections
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.decode_step.ptx import thread as t

MOST_WARPS = 12
"""Of a block of the decode step."""
REGION = 40
"""Bits of an address within an array; those above say which array."""
I32, I64, F32, BOOL = "i32", "i64", "f32", "i1"
DTYPES = {
    I32: np.dtype(np.int32), I64: np.dtype(np.int64), F32: np.dtype(np.float32),
    BOOL: np.dtype(np.bool_),
}  # fmt: skip


class Race(AssertionError):
    """Two warps met in shared memory without a barrier between them."""


class Deadlock(AssertionError):
    """Everybody waits."""


class Lanes:
    """A number for every thread, or one for all, with its type as MLIR names it."""

    __slots__ = ("data", "type")

    def __init__(self, data: Any, kind: str):
        self.data, self.type = np.asarray(data, DTYPES[kind]), kind

    @classmethod
    def computed(cls, data: Any, kind: str) -> "Lanes":
        """Of numbers that NumPy made in this type: millions, which nobody needs to look at."""
        self = cls.__new__(cls)
        self.data, self.type = data, kind
        return self


class Role(NamedTuple):
    """The threads of a block that run the same code."""

    block: int
    first: int
    count: int


class Barrier:
    """An mbarrier."""

    def __init__(self, arrivals: int):
        self.arrivals, self.pending, self.bytes, self.turn = arrivals, arrivals, 0, 0

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.turn, self.pending = self.turn + 1, self.arrivals


class Shared:
    """A block's shared memory, and who was where since the last barrier."""

    def __init__(self, size: int, seed: int, warps: int):
        self.words = np.random.default_rng(seed).integers(0, 2**32, size // 4, dtype=np.uint32)
        self.epoch = 1
        self.written, self.writer = (np.zeros(size // 4, np.int32) for _ in range(2))
        # When each warp did so last.
        self.read, self.warps = np.zeros((size // 4, warps), np.int32), np.arange(warps)
        self.barriers: dict[int, Barrier] = {}

    def reads(self, word: np.ndarray, warp: np.ndarray) -> None:
        """Words of several loads, `[..., threads]`, and the warp of each thread."""
        if ((self.written[word] == self.epoch) & (self.writer[word] != warp)).any():
            raise Race("a warp read what another had written")
        self.read[word, warp] = self.epoch

    def writes(self, word: np.ndarray, warp: np.ndarray) -> None:
        read, others = self.read[word] == self.epoch, warp[:, None] != self.warps
        if (read & others).any():
            raise Race("a warp wrote what another had read")
        if ((self.written[word] == self.epoch) & (self.writer[word] != warp)).any():
            raise Race("two warps wrote the same word")
        self.written[word], self.writer[word] = self.epoch, warp


class Machine:
    """Runs blocks of several roles over arrays.

    Args:
        blocks: of each device.
        shared: bytes of shared memory of a block, of which `unwatched` (begin, end) ones are
            filled by copies and not watched for races.
        warps: of a block, at most.
        devices: on which a kernel runs. A role's block is counted over all of them.
    """

    def __init__(
        self,
        blocks: int,
        shared: int,
        unwatched: tuple[int, int],
        seed: int,
        warps: int = MOST_WARPS,
        devices: int = 1,
    ):
        self.random = random.Random(seed)
        self.arrays: list[np.ndarray] = []
        self.shared = [Shared(shared, seed + b, warps) for b in range(devices * blocks)]
        self.blocks = blocks
        # Addresses on all devices, by each of them.
        self.alike: dict[int, list[int]] = {}
        self.unwatched = unwatched
        self.semaphores, self.copies = [0] * devices, []
        self.arrived: dict[tuple[int, int], int] = collections.Counter()
        self.progress, self.failed = 0, None
        self.batons: list[threading.Lock] = []
        self.alive: list[int] = []
        # Who waited in vain since the last progress, and which that was.
        self.idle: set[int] = set()
        self.idle_since = 0
        self.local = threading.local()

    # Arrays and addresses

    def array(self, values: np.ndarray) -> int:
        """The address of a copy of an array."""
        self.arrays.append(np.ascontiguousarray(values).reshape(-1).view(np.uint8).copy())
        return len(self.arrays) << REGION

    def bytes_at(self, address: int) -> np.ndarray:
        return self.arrays[(address >> REGION) - 1]

    # Taking turns

    def run(self, workers: Sequence[tuple[Role, Callable[[], None]]]) -> None:
        def work(number: int, role: Role, code: Callable[[], None]) -> None:
            self.local.number, self.local.role = number, role
            self.local.masks = [np.ones(role.count, bool)]
            try:
                self._await_baton()
                # Threads that aren't at work compute with anything.
                with np.errstate(all="ignore"):
                    code()
            except BaseException as error:  # for whoever called `run`
                self.failed = self.failed or error
            self.alive.remove(number)
            self._pass_on()

        self.alive = list(range(len(workers)))
        self.batons = [threading.Lock() for _ in workers]
        for baton in self.batons:
            baton.acquire()
        threads = [
            threading.Thread(target=work, args=(n, *worker), daemon=True)
            for n, worker in enumerate(workers)
        ]
        for thread in threads:
            thread.start()
        self._pass_on()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed

    def _pass_on(self) -> None:
        if self.failed:
            for number in self.alive:
                if self.batons[number].locked():
                    self.batons[number].release()
            return
        if self.copies:
            # A copy lands at any time, and those of others before or after.
            self.copies.pop(self.random.randrange(len(self.copies)))()
        if self.alive:
            # Who looked since the last change would wait again.
            idle = self._idle()
            ready = [n for n in self.alive if n not in idle]
            self.batons[self.random.choice(ready or self.alive)].release()

    def _idle(self) -> set[int]:
        if self.idle_since != self.progress:
            self.idle, self.idle_since = set(), self.progress
        return self.idle

    def _await_baton(self) -> None:
        self.batons[self.local.number].acquire()
        if self.failed:
            raise Deadlock("another failed")

    def give_way(self) -> None:
        """Of a role that waits for something."""
        idle = self._idle()
        idle.add(self.local.number)
        if len(idle) >= len(self.alive) and not self.copies:
            self.failed = Deadlock(f"{len(self.alive)} roles wait for each other")
        self._pass_on()
        self._await_baton()

    # What threads do

    @property
    def mask(self) -> np.ndarray:
        return self.local.masks[-1]

    @property
    def role(self) -> Role:
        return self.local.role

    @property
    def device(self) -> int:
        return self.role.block // self.blocks

    def lanes(self, value: t.V) -> np.ndarray:
        data = value.raw.data
        return data if data.ndim else np.full(self.role.count, data)

    def masked(self, mask: np.ndarray, code: Callable[[], Any]) -> Any:
        self.local.masks.append(mask)
        try:
            return code()
        finally:
            self.local.masks.pop()

    def load(self, address: np.ndarray, count: int, mask: np.ndarray) -> list[np.ndarray]:
        """Words at addresses in arrays."""
        out = np.zeros((count, self.role.count), np.uint32)
        for words, at, of in self._arrays_at(address, 4 * count, mask):
            out[:, of] = words[at + np.arange(count)[:, None]]
        return [x.view(np.int32) for x in out]

    def store(self, address: np.ndarray, values: Sequence[np.ndarray]) -> None:
        self.progress += 1
        for words, at, of in self._arrays_at(address, 4 * len(values), self.mask):
            for n, value in enumerate(values):
                words[at + n] = value[of].view(np.uint32)

    def _arrays_at(
        self, address: np.ndarray, size: int, mask: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The words of each array in turn, and which of them which threads at work meet."""
        assert (address[mask] % size == 0).all(), "a load or store is not aligned"
        regions = address >> REGION
        for region in set(regions[mask].tolist()):
            of = mask & (regions == region)
            yield self.arrays[region - 1].view(np.uint32), address[of] % (1 << REGION) // 4, of

    def _shared_words(
        self, address: np.ndarray, count: int, mask: np.ndarray, writes: Any
    ) -> np.ndarray | None:
        shared = self.shared[self.role.block]
        assert (address % (4 * count) == 0).all(), "shared memory is not aligned"
        word = address // 4 + np.arange(count)[:, None]
        assert (word < len(shared.words)).all(), "past the end of shared memory"
        watched = (address < self.unwatched[0]) | (address >= self.unwatched[1])
        if watched.any():
            warp = ((self.role.first + np.arange(self.role.count)) // t.WARP)[mask][watched]
            (shared.reads if writes is None else shared.writes)(word[:, watched], warp)
        if writes is None:
            return shared.words[word]
        shared.words[word] = [x[mask].view(np.uint32) for x in writes]
        return None

    def load_shared(self, address: np.ndarray, count: int, mask: np.ndarray) -> list[np.ndarray]:
        out = np.zeros((count, self.role.count), np.uint32)
        out[:, mask] = self._shared_words(address[mask], count, mask, writes=None)
        return [x.view(np.int32) for x in out]

    def store_shared(self, address: np.ndarray, values: Sequence[np.ndarray]) -> None:
        self._shared_words(address[self.mask], len(values), self.mask, values)

    def expect(self, barrier: int, size: int) -> None:
        """The arrival of whoever starts copies of so many bytes."""
        self._barrier(barrier).bytes += size
        self.arrive(barrier)

    def copy(self, shared: int, source: int, size: int, barrier: int) -> None:
        """One copy, which lands later."""
        block, waited = self.shared[self.role.block], self._barrier(barrier)
        at = source & ((1 << REGION) - 1)

        def land() -> None:
            data = self.bytes_at(source)[at : at + size].copy()
            assert len(data) == size, "a copy past the end of its array"
            block.words[shared // 4 : (shared + size) // 4] = data.view(np.uint32)
            waited.bytes -= size
            waited.settle()
            self.progress += 1

        self.copies.append(land)

    def _barrier(self, address: int) -> Barrier:
        return self.shared[self.role.block].barriers[address]

    def arrive(self, address: int) -> None:
        barrier = self._barrier(address)
        barrier.pending -= 1
        barrier.settle()
        self.progress += 1

    def await_turn(self, address: int, parity: int) -> None:
        while self._barrier(address).turn % 2 == parity:
            self.give_way()

    def block_barrier(self, threads: int, barrier: int = t.OURS) -> None:
        block = self.role.block
        if threads == self.role.count:
            self.shared[block].epoch += 1
            return
        come = self.arrive_at(barrier)
        while self.arrived[block, barrier] // threads < -(-come // threads):
            self.give_way()

    def arrive_at(self, barrier: int) -> int:
        """Counts this role's threads at a barrier of the block; how many have come so far."""
        self.arrived[self.role.block, barrier] += self.role.count
        self.progress += 1
        return self.arrived[self.role.block, barrier]
