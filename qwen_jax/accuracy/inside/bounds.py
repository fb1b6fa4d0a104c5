"""What the decode-step kernels declare of their arithmetic, and how far it may be from float64.

Sums of products are float32 on tensor cores, which add 16 products at a time to a running sum,
aligned to the largest of them, and cut off what doesn't fit where float32 would round (Fasi,
Higham, Mikaitis and Pranesh, 2021, Numerical behavior of NVIDIA tensor cores, PeerJ Comput. Sci.
7:e330). So each step's error has twice float32's unit u, and no mean of zero: it is toward zero, by
u of the running sum at most on average. With L, and the mean of the squared partial sums over all
orders, as in `exact.bounds`, n products are off by

    2 L u sqrt(n y^2 / 3 + (n / 6 + 1) sum p_i^2) + n / 16 u sqrt(y^2 / 3 + sum p_i^2 / 6).

A float32 that is exchanged lends its last bit to a flag, which costs 2^-23 of it. In a step of few
rows an input enters as two numbers of 16 bits, rounded and the rest: of bfloat16 they are off by
2^-16 of it, of float16 by 2^-22 or 2^-29 (`ptx.formats`). In one of many rows it is what was
exchanged, exactly. Units of the approximate functions are those of the PTX ISA: 2 ulps of ex2, 1 of
rcp and rsqrt.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pallas_kernels.decode_step.packed.plan import StepPlan
from pallas_kernels.decode_step.ptx.formats import FORMATS
from qwen_jax.accuracy.exact.bounds import U32, Arithmetic, L, bound
from qwen_jax.accuracy.exact.operations import OPERATIONS, Context
from qwen_jax.accuracy.exact.rounding import UNIT
from qwen_jax.accuracy.inside.held import Matrix

Array = np.ndarray
FLAG = 2.0**-23
LEAST = {"bfloat16": 2.0**-133, "float16": 2.0**-25}
"""Half of the spacing of a format's smallest numbers."""
KEPT = {"bfloat16": (2.0**-16, 0.0), "float16": (2.0**-22, 2.0**-29)}
"""What two numbers of a format keep of an input: to within that part of it, or that at least."""
ROWS_AT_ONCE = 8192
"""Of a matrix in float64."""
F32 = Arithmetic()


class Valued(NamedTuple):
    """A tensor in float64, and how far the kernel's may be off."""

    value: Float[np.ndarray, "..."]
    limit: Float[np.ndarray, "..."]

    @classmethod
    def exactly(cls, value: Float[np.ndarray, "..."]) -> "Valued":
        """What is recorded: in float64, and off by nothing."""
        return cls(value.astype(np.float64), np.zeros(value.shape))

    def columns(self, first: int, last: int) -> "Valued":
        return Valued(self.value[:, first:last], self.limit[:, first:last])

    def plus(self, limit: Float[np.ndarray, "..."] | float) -> "Valued":
        """With more to be off by."""
        return Valued(self.value, self.limit + limit)

    def rounded(self, dtype: str, scale: float = 1.0) -> "Valued":
        """Rounded to a 16-bit format, which holds it times `scale`."""
        return self.plus(UNIT[dtype] * (np.abs(self.value) + self.limit) + LEAST[dtype] / scale)


@dataclasses.dataclass(frozen=True)
class Declared:
    """The arithmetic of one kernel.

    Attributes:
        few: whether it is that of few rows.
        cache: dtype of keys and values.
    """

    plan: StepPlan
    few: bool
    cache: str

    @property
    def flag(self) -> float:
        """Of a hidden state once it is exchanged; of many rows it is recorded before."""
        return FLAG if self.few else 0.0

    def format(self, phase: int) -> str:
        """In which the products of a phase are taken."""
        this = self.plan.phases[phase].format
        return next(name for name, each in FORMATS.items() if each is this)


def summed(y: Array, squares: Array, n: float) -> Array:
    """Of a tensor core's sum of n products with the sum of their squares, as derived above."""
    mean = y * y / 3 + squares / 6
    steps = 2 * L * U32 * np.sqrt(n * mean + squares)
    found: Array = steps + n / 16 * U32 * np.sqrt(mean)
    return found


def product(x: Valued, matrix: Matrix, kept: tuple[float, float] | None) -> Valued:
    """x times the transposed matrix.

    Args:
        x: what the kernel had, and how far that may be from this.
        kept: of `KEPT`; None for inputs that enter as they are.
    """
    pieces = [
        _product(x, matrix.rows(first, first + ROWS_AT_ONCE), kept)
        for first in range(0, len(matrix.values), ROWS_AT_ONCE)
    ]
    return Valued(*(np.concatenate(each, axis=1) for each in zip(*pieces, strict=True)))


def _product(x: Valued, matrix: Matrix, kept: tuple[float, float] | None) -> tuple[Array, Array]:
    values, squared, n = matrix.values.astype(np.float64), x.value**2, x.value.shape[1]
    y, of_values = x.value @ values.T, values**2
    squares = squared @ of_values.T
    if matrix.addends is None:
        own, apart, each = summed(y, squares, n), squares, of_values.sum(1)
    else:
        # Sums of 16 inputs meet an addend, so that one product's square is 16 of them at most.
        addends = matrix.addends.astype(np.float64)
        codes, added = values - addends, x.value @ addends.T
        of_codes, of_addends = squared @ (codes**2).T, 16 * squared @ (addends**2).T
        own = summed(y - added, of_codes, 17 / 16 * n) + summed(added, of_addends, 17 / 16 * n)
        apart, each = of_codes + of_addends, (codes**2).sum(1) + 16 * (addends**2).sum(1)
    if kept:
        # Means of 16 inputs are made of five sums, and are kept as inputs are.
        part = kept[0] + (8 * U32 if matrix.addends is not None else 0)
        own = own + L * (part * np.sqrt(apart) + kept[1] * np.sqrt(each))
    if matrix.rounding is not None:
        own = own + L * np.sqrt(squared @ matrix.rounding.astype(np.float64).T)
    if x.limit.any():
        own = own + np.sqrt(x.limit**2 @ of_values.T)
    return y, own


def norm(name: str, ctx: Context, x: Array, weight: Array) -> Valued:
    """One of the norms, its result in float32."""
    y = OPERATIONS[name](ctx, [x], [weight])
    return Valued(y, bound(name, ctx, F32, y, [x], [0.0], [weight]))


def normed_product(
    x: Valued, matrix: Matrix, kept: tuple[float, float] | None, bias: Array | float = 0.0
) -> Valued:
    """A product after a norm: multiplied with the norm's scale afterwards, then the bias added."""
    found = product(x, matrix, kept)
    # A norm's scale is off for all of a row's inputs alike, by eight roundings and the mean's.
    scale = U32 * (8 + L * (x.value.shape[1] / 3) ** 0.5 / 2)
    y = found.value + bias
    own = (scale + 3 * U32) * np.abs(found.value) + U32 * (np.abs(bias) + np.abs(y))
    return Valued(y, found.limit + own)


def rotated(name: str, ctx: Context, x: Array, cache: str) -> Valued:
    """Queries or keys after the rotation, rounded to the cache's dtype."""
    y = OPERATIONS[name](ctx, [x], [])
    return Valued(y, bound(name, ctx, F32, y, [x], [0.0], [])).rounded(cache)


def attended(
    ctx: Context, queries: Array, keys: Array, values: Array, cache: str, parts: bool
) -> Valued:
    """Attention's result of one row, [1, NH], from what the kernel multiplies.

    Weights enter the product with the values in the cache's dtype; their sum is of unrounded ones.
    Where blocks share a context, each publishes its values, its sum and its maximum with flags:
    that of the maximum m counts |m| times.

    Args:
        queries, keys, values: `[1, N, H]` and `[S, K, H]`, all of the cache's dtype.
        parts: whether blocks share the context.
    """
    scores = OPERATIONS["attn_scores"](ctx, [queries, keys])
    off = 2 * bound("attn_scores", ctx, F32, scores, [queries, keys], [0.0, 0.0], [])
    probs = OPERATIONS["attn_probs"](ctx, [scores])
    off_probs = bound("attn_probs", ctx, F32, probs, [scores], [off], [])
    y = OPERATIONS["attn_out"](ctx, [probs, values])
    held = values[:, ctx.knobs.kv_head(ctx.config)].swapaxes(0, 1)  # [N, S, H]

    def mixed(weights: Array, of: Array) -> Array:
        return (weights.swapaxes(0, 1) @ of).swapaxes(0, 1).reshape(y.shape)

    squares, sizes = mixed(probs**2, held**2), mixed(probs, np.abs(held))
    own = summed(y, squares, len(keys)) + L * UNIT[cache] * np.sqrt(squares)
    own += L * LEAST[cache] * mixed(np.ones_like(probs), held**2) ** 0.5
    own += np.sqrt(mixed(off_probs**2, held**2)) + 4 * U32 * sizes
    if parts:
        own += 2 * FLAG * (2 + np.abs(scores).max()) * sizes
    return Valued(y, own)


def gated(ctx: Context, gate: Valued, up: Valued) -> Valued:
    """silu(gate) up by approximate functions: ex2, rcp, two products and a sum."""
    both, off = [gate.value, up.value], [gate.limit, up.limit]
    y = OPERATIONS["ffn_act"](ctx, both)
    own = bound("ffn_act", ctx, F32, y, both, off, [])
    return Valued(y, own + 8 * U32 * np.abs(y) + 4 * U32 * np.abs(gate.value * up.value))
