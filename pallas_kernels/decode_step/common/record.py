"""What a step that records keeps of itself: the words that blocks leave for each other, of every
layer.

The exchange is written over layer by layer, so a step that is built to record stores each word a
second time, where nobody waits for it and nothing is written over. Memory for it lies behind the
exchange's; a step that isn't built so has neither the memory nor the stores. Queries and, of many
rows, the hidden state never leave the block that needs them: they are stored as it has them.
"""

import dataclasses
import enum
import itertools
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels.decode_step.packed.plan import DOWN, StepPlan
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V


class Recorded(enum.IntEnum):
    """What is kept, each of every layer unless said otherwise."""

    QKV = 0
    QUERIES = 1
    """Rotated, in the cache's dtype."""
    ATTN_OUT = 2
    ATTN_RESIDUAL = 3
    FFN_ACT = 4
    DOWN_PARTS = 5
    HIDDEN = 6
    """The embeddings, then the hidden state after each layer."""
    NORMED = 7
    """Of many rows: the input of each product after a norm, as `Step` of many rows makes it."""
    SCALES = 8
    """The same: what those products are multiplied with, of each of 64 rows."""


@dataclasses.dataclass(frozen=True)
class RecordLayout:
    """Where everything lies: what is kept, one after the other, each turn by turn.

    Attributes:
        sizes: words of a turn.
        turns: a layer's is one.
    """

    sizes: tuple[int, ...]
    turns: tuple[int, ...]

    @classmethod
    def of(cls, plan: StepPlan, rows: int, **others: int) -> "RecordLayout":
        """Of float32 numbers; `others` are words of a turn where that isn't so.

        Args:
            others: by names of `Recorded` in lower case.
        """
        shape, layers = plan.shape, plan.shape.layers
        query = shape.heads * shape.head_dim
        words = {
            "qkv": rows * shape.qkv,
            "queries": rows * query // 2,
            "attn_out": rows * query,
            "attn_residual": rows * shape.hidden,
            "ffn_act": rows * shape.packed_ffn,
            "down_parts": plan.phases[DOWN].parts * rows * shape.hidden,
            "hidden": rows * shape.hidden,
            "normed": 0,
            "scales": 0,
        } | others
        norms = 2 * layers + 1
        sizes = tuple(-(-words[each.name.lower()] // 4) * 4 for each in Recorded)
        return cls(sizes, (*[layers] * 6, layers + 1, norms, norms))

    @property
    def begins(self) -> list[int]:
        each = (size * turns for size, turns in zip(self.sizes, self.turns, strict=True))
        return [0, *itertools.accumulate(each)]

    @property
    def total(self) -> int:
        return self.begins[-1]

    def words(self, words: Int[np.ndarray, "all"], what: Recorded) -> Int[np.ndarray, "turns size"]:
        """What was kept, from all words."""
        begin, end = self.begins[what : what + 2]
        return words[begin:end].reshape(self.turns[what], self.sizes[what])

    def floats(
        self, words: Int[np.ndarray, "all"], what: Recorded, *shape: int
    ) -> Float[np.ndarray, "turns ..."]:
        """The same as float32, a turn of that shape."""
        found = self.words(words, what)
        size = int(np.prod(shape))
        return found[:, :size].view(np.float32).reshape(len(found), *shape)

    def halves(
        self, words: Int[np.ndarray, "all"], what: Recorded, dtype: Any
    ) -> Float[np.ndarray, "turns size"]:
        """The same as numbers of 16 bits."""
        return self.words(words, what).view(dtype)


@dataclasses.dataclass(frozen=True)
class Record:
    """The memory of a launch that records."""

    memory: V
    layout: RecordLayout

    def at(self, what: Recorded, turn: int | V, index: int | V = 0) -> V:
        """The address of a word of a turn."""
        begin = self.memory + 4 * self.layout.begins[what]
        if isinstance(turn, V):
            begin = begin + turn.wide() * (4 * self.layout.sizes[what])
        else:
            begin = begin + 4 * self.layout.sizes[what] * turn
        if isinstance(index, V):
            return begin + (index << 2).wide()
        return begin + 4 * index

    def keep_query(self, layer: V, index: V, pair: V, apart: int) -> None:
        """Keeps two numbers of a layer's queries, the second so many further than `index`."""
        at = self.at(Recorded.QUERIES, layer) + (index << 1).wide()
        t.store_global_half(at, pair)
        t.store_global_half(at + 2 * apart, pair >> 16)
