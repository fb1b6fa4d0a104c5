"""The few shapes that programs are compiled for, by platform."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from qwen_jax.model.cache import PAGE

_CPU_COSTS = ((1, 1.0), (8, 2.5))
_GPU_COSTS = ((1, 1.0), (8, 1.2), (64, 1.95))
"""Of the bundled model on two cores, and of 0.5B on an H200; larger models' grow less."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of calls.

    Attributes:
        rows: how many rows a call of `step` may have, ascending; the last are all slots.
        lengths: of pieces of prompts, ascending; the last divides a page.
        pieces: how many a call of `extend` may have, ascending,
        positions: and of how many positions at most, unless one piece has more.
        steps: decode steps between two looks at the result.
        ahead: whether the host works while the device does: a GPU computes the next steps while
            the host reads the last ones. A CPU would compete with itself, for steps that may not
            be needed.
        unmasked: whether texts that keep to their constraint by themselves are let go by its masks:
            where these take longer than steps.
        costs: what a step of so many rows takes, in steps of one row; ascending.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    pieces: tuple[int, ...]
    positions: int
    steps: int
    ahead: bool
    unmasked: bool = False
    costs: tuple[tuple[int, float], ...] = ((1, 1.0),)

    @property
    def slots(self) -> int:
        return self.rows[-1]

    @property
    def batch_invariant(self) -> bool:
        """Whether calls are of one size, whatever there is to do."""
        return len(self.rows) == len(self.pieces) == 1

    def cost(self, rows: int) -> float:
        """What a step of so many rows takes, in steps of one."""
        sizes, steps = ([pair[i] for pair in self.costs] for i in (0, 1))
        return float(np.interp(rows, sizes, steps))

    def sizes(self, length: int) -> tuple[int, ...]:
        """How many pieces of a length a call may have, ascending."""
        return tuple(n for n in self.pieces if n * length <= self.positions) or (1,)

    def extends(self, pieces: Iterable[int]) -> set[tuple[int, int]]:
        """Length and number of pieces of the calls that so many of any length need."""
        return {(n, fitting(self.sizes(n), count)) for n in self.lengths for count in pieces}

    def length_for(self, tokens: int) -> int:
        """The length of the next piece where so many tokens of a page are left.

        Several short ones compute less than a page that is mostly padding, but read the weights
        as often.
        """
        page = self.lengths[-1]
        return next((n for n in self.lengths if tokens <= min(6 * n, page)), page)


def shapes_for(platform: str, slots: int | None = None, batch_invariant: bool = False) -> Shapes:
    """Those of a platform, for so many slots; by default as many as it makes good use of.

    A GPU's steps take little longer for 64 rows than for one. On a CPU products take longer with
    each row, while what does not depend on their number is done sooner.

    Args:
        batch_invariant: every step has all slots and every piece of a prompt comes in a call of
            one size. Products of another size are rounded otherwise; so a text's bits depend on
            nothing but the text.
    """
    if platform == "cpu":
        slots = slots or 8
        # Of a page alone a product makes good use of two cores; short pieces take a fifth to a
        # third less each where four are together, and a third to two thirds where 16 are.
        shapes = Shapes(
            _up_to(slots, 1), (16, PAGE), (1, 4, 16), 256, steps=4, ahead=False, costs=_CPU_COSTS
        )
    else:
        slots = slots or 64
        # Of whole pages an eighth would be padding where prompts are 20 to 900 tokens long.
        half = PAGE // 2
        shapes = Shapes(
            _up_to(slots, 1, 8, 32),
            (half,),
            (4, 32),
            32 * half,
            steps=8,
            ahead=True,
            unmasked=True,
            costs=_GPU_COSTS,
        )
    if not batch_invariant:
        return shapes
    return dataclasses.replace(
        shapes, rows=shapes.rows[-1:], pieces=shapes.pieces[-1:], unmasked=False
    )


def _up_to(slots: int, *sizes: int) -> tuple[int, ...]:
    return (*(n for n in sizes if n < slots), slots)


def fitting(sizes: tuple[int, ...], count: int) -> int:
    """The smallest of some sizes that holds so many, or the largest."""
    return next((n for n in sizes if n >= count), sizes[-1])


class Piece(NamedTuple):
    """Tokens of a text that enter the cache together: `length` from `start` on, padded."""

    start: int
    length: int
    padded: int


def pieces_of(start: int, stop: int, shapes: Shapes) -> Iterator[Piece]:
    """How a text's tokens from `start` to `stop` enter the cache.

    No piece lies in two pages, so that it is the same whether the pages before it are shared.
    """
    while start < stop:
        left = min(stop, (start // PAGE + 1) * PAGE) - start
        padded = shapes.length_for(left)
        length = min(left, padded)
        yield Piece(start, length, padded)
        start += length
