"""The weights of a decode-step kernel as it multiplies with them, and what it makes of them.

A block format's weight is a code times a factor, and in most plus an addend: a minimum, or what
codes are less by. The kernel of few rows multiplies with codes, from 0 on, and with addends apart,
and rounds neither. The kernel of many rows makes one float16 of a weight: of u = 2^-11 the factor
is off by u of itself (the same for all inputs of a group, 32 at most, which therefore count
sqrt(32) times what independent roundings would), a minimum, taken at the middle code, likewise, and
the result by another u. Below float16's normal numbers each of these is off by 2^-25 at most
instead.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.decode_step import Packed, StepPlan
from pallas_kernels.decode_step.packed.blocks import Blocks
from pallas_kernels.decode_step.packed.packing import in_order
from pallas_kernels.decode_step.packed.scales import Integers
from pallas_kernels.decode_step.packed.storages import STORAGES
from qwen_jax.accuracy.exact.rounding import UNIT

GROUP = 32
"""Inputs of a group, at most."""
_U, _LEAST = UNIT["float16"], 2.0**-25


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix, or some rows or columns of it.

    Attributes:
        values: the weights, which float32 holds.
        addends: the part of them that is multiplied apart; None without any.
        rounding: the square of what each is off by in products, all together; None where exact.
    """

    values: Float[np.ndarray, "out in"]
    addends: Float[np.ndarray, "out in"] | None
    rounding: Float[np.ndarray, "out in"] | None

    def rows(self, first: int, last: int) -> "Matrix":
        return self._cut((slice(first, last),))

    def columns(self, first: int, last: int) -> "Matrix":
        return self._cut((slice(None), slice(first, last)))

    def _cut(self, index: tuple[slice, ...]) -> "Matrix":
        addends, rounding = (None if x is None else x[index] for x in (self.addends, self.rounding))
        return Matrix(self.values[index], addends, rounding)


def matrix(packed: Packed, plan: StepPlan, phase: int, layer: int, few: bool) -> Matrix:
    """A phase's matrix in a layer.

    Args:
        few: for the kernel of few rows.
    """
    parts = []
    for segment, name in enumerate(plan.stored(phase, layer)):
        at = packed.at(plan, phase, layer, segment)
        parts.append(_tiles(packed.stream, at, name, plan.granules(name), few))

    def whole(which: int) -> np.ndarray:
        every = [np.zeros(part[0].shape) if part[which] is None else part[which] for part in parts]
        return in_order(plan, phase, np.concatenate([np.asarray(x, np.float32) for x in every]))

    there = [any(part[which] is not None for part in parts) for which in range(3)]
    return Matrix(whole(0), whole(1) if there[1] else None, whole(2) if there[2] else None)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _tiles(
    stream: UInt32[Array, "granules words"], at: Int[Array, "n"], name: str, count: int, few: bool
) -> tuple[Float[Array, "n 16 128"], Float[Array, "n 16 128"] | None, Any]:
    """`Matrix`, tile by tile."""
    words = stream[at[:, None] + jnp.arange(count, dtype=at.dtype)].reshape(len(at), -1)
    storage = STORAGES[name]
    values = storage.numbers(words).astype(jnp.float32)
    if not isinstance(storage, Blocks):
        return values, None, None
    factors, addends = storage.scales_of(words)
    if few:
        return values, addends, None
    rounding = (_U * values) ** 2 + _LEAST**2
    if storage.scales.adds:
        assert addends is not None
        most = 1 << (sum(storage.bits) - 1)
        middle = factors * most + addends
        rounding += GROUP * _U**2 * ((values - middle) ** 2 + middle**2)
        rounding += GROUP * _LEAST**2 * (most**2 + 1)
    elif isinstance(storage.scales, Integers):
        rounding += GROUP * ((_U * values) ** 2 + (_LEAST * 128) ** 2)
    return values, None, rounding
