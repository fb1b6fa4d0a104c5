"""The flagged exchange: memory in which blocks publish numbers, each with the flag of its layer.

The last bit of a float32 is the flag, the parity of its layer: a reader polls until every word has
it. Each word stands for itself, so no fence and no barrier across the grid is needed, and what
arrives first is already there when the last does. The bit costs 2^-23 of the value. This is
the idea of NCCL's LL protocol, with the flag inside the word.

A word may be overwritten one layer later without asking: whoever reads words publishes others,
which the next layer's writers wait for. Nobody waits for the readers of the head, and nothing is
written after it. This chain of relaxed loads and stores is ordered because a load that has seen
a word is served by the L2 cache, as are all that its thread makes after it.

Devices that have a model together publish for each other in the same way: what each has of o_proj's
and of the down projection's sums is stored in the memory of all. Here too a word may be overwritten
one layer later: before a device publishes the next o_proj's it has had all parts of the down
projection from the others, which they made of hidden states that stand for all that they read of
o_proj's; and the other way round.
"""

import dataclasses
import enum
import itertools
from collections.abc import Iterable, Sequence

from pallas_kernels.decode_step.common.devices import Devices
from pallas_kernels.decode_step.common.record import Record, Recorded, RecordLayout
from pallas_kernels.decode_step.packed.plan import DOWN, StepPlan
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V


class Section(enum.IntEnum):
    """What is exchanged, in a step of few rows."""

    QKV = 0
    ATTN_OUT = 1
    ATTN_RESIDUAL = 2
    FFN_ACT = 3
    DOWN_PARTS = 4
    """Of every part of the down projection, the sums."""
    HIDDEN = 5
    """The embeddings, then the hidden state after a layer."""
    SPLITS = 6
    """What every split of a row's context found, where several blocks attend to it: its values."""
    STATS = 7
    """The same: its maximum and the sum of its weights."""
    O_PARTS = 8
    """Of every device, where several have the model, its sums of o_proj."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the sections lie: `sizes` words each, one after the other."""

    sizes: tuple[int, ...]

    @classmethod
    def aligned(cls, sizes: Iterable[int]) -> "Layout":
        """Of at least so many words each: copies and wide stores want 16 bytes."""
        return cls(tuple(-(-size // 4) * 4 for size in sizes))

    @classmethod
    def of(cls, plan: StepPlan, rows: int, splits: int, devices: int = 1) -> "Layout":
        shape = plan.shape
        query = shape.heads * shape.head_dim
        parts = plan.phases[DOWN].parts * devices
        d, ffn = shape.hidden, shape.packed_ffn
        widths = (shape.qkv, query, d, ffn, parts * d, d)
        several = splits if splits > 1 else 0
        split = (query * several, 2 * shape.heads * several)
        o_parts = d * (devices if devices > 1 else 0)
        return cls.aligned(rows * width for width in (*widths, *split, o_parts))

    @property
    def begins(self) -> list[int]:
        return [0, *itertools.accumulate(self.sizes)]

    @property
    def total(self) -> int:
        return sum(self.sizes)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The memory of a launch, and where its sections lie in it.

    Attributes:
        record: of a launch that records, where.
        devices: that have the model together, if they are several.
    """

    memory: V
    layout: Layout
    record: Record | None = None
    devices: Devices | None = None

    @classmethod
    def of(
        cls,
        memory: V,
        layout: Layout,
        record: RecordLayout | None,
        devices: Devices | None = None,
    ) -> "Exchange":
        """With the memory of a record, if there is one, behind it."""
        if record is None:
            return cls(memory, layout, devices=devices)
        return cls(memory, layout, Record(memory + 4 * layout.total, record))

    @property
    def count(self) -> int:
        """Devices that have the model."""
        return 1 if self.devices is None else len(self.devices.exchanges)

    @property
    def scope(self) -> str:
        """Of loads and stores of what all devices publish."""
        return "gpu" if self.devices is None else "sys"

    def part(self, of_device: int | V, parts: int) -> int | V:
        """Where among all devices' parts one of this device's lies, which has so many."""
        return of_device if self.devices is None else of_device + self.devices.mine * parts

    def everywhere(self, address: V) -> list[V]:
        """A word of this device's memory, and the same of all others'."""
        if self.devices is None:
            return [address]
        offset = address - self.memory
        return [exchange + offset for exchange in self.devices.exchanges]

    def at(self, section: int, index: int | V = 0) -> V:
        """The address of a word of a section."""
        begin = self.memory + 4 * self.layout.begins[section]
        if isinstance(index, V):
            return begin + (index << 2).wide()
        return begin + 4 * index

    def kept(
        self, what: Recorded, turn: int | V, row: int | V = 0, width: int = 0, column: int | V = 0
    ) -> V | None:
        """Where a row's word, of `width` a row, is kept as well in a launch that records."""
        return None if self.record is None else self.record.at(what, turn, row * width + column)


def publish(
    address: V, values: Sequence[V], flag: V, kept: V | None = None, scope: str = "gpu"
) -> None:
    """Stores float32 numbers, each with its last bit replaced by the flag, 0 or 1.

    Args:
        kept: where to store them a second time.
        scope: "gpu", or "sys" where another device's blocks read them.
    """
    words = [(value.bits() & -2) | flag for value in values]
    t.store_global(address, words, f"relaxed.{scope}.")
    if kept is not None:
        t.store_global(kept, words)


def poll(
    addresses: Sequence[V],
    count: int,
    flag: V,
    where: Sequence[V] | None = None,
    scope: str = "gpu",
) -> list[list[V]]:
    """`count` float32 at each address, once all have the flag; no number if not `where`.

    Args:
        scope: "gpu", or "sys" where another device's blocks publish them.
    """

    wanted: Sequence[V | None] = where or [None] * len(addresses)

    def look() -> tuple[V, list[V]]:
        words = [
            w
            for a, there in zip(addresses, wanted, strict=True)
            for w in t.load_global(a, count, f"relaxed.{scope}", where=there, otherwise=flag)
        ]
        late = words[0] ^ flag
        for word in words[1:]:
            late = late | (word ^ flag)
        return (late & 1).differs(0), words

    words = [w.bits() for w in t.repeat_while(look, len(addresses) * count)]
    return [words[i : i + count] for i in range(0, len(words), count)]
