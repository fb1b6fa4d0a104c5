"""Which of two kernels runs a step: the one of few rows, or the one of many."""

from collections.abc import Callable
from typing import Any

from jax.typing import DTypeLike

from pallas_kernels.decode_step.common.cache import Pool
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few
from pallas_kernels.decode_step.many_rows import mosaic_gpu as many
from pallas_kernels.decode_step.packed.plan import Plan

FEW = 15_000
"""Numbers of an input up to which the first is faster: each block reads all of them as float32."""


def refusal(plan: Plan, rows: int, dtype: DTypeLike) -> str | None:
    """Why neither can run a step, or None."""
    if few.refusal(plan, rows, dtype) is None:
        return None
    return many.refusal(plan, rows, dtype)


def build(
    plan: Plan, rows: int, pool: Pool, dtype: DTypeLike, traced: bool = False
) -> Callable[..., Any]:
    """The faster one, of those that can, for one model, number of rows, cache size and dtype.

    Returns a function of (tape, table, bias, norms, hidden, rope, pages, block tables, positions)
    to (logits, new keys and values, scratch); and, if traced, the nanosecond at which each block
    ended each of `step.PHASES`, int32 `[blocks, phases]`.
    """
    faster = rows * plan.shape.hidden <= FEW or many.refusal(plan, rows, dtype) is not None
    kernel = few if faster and few.refusal(plan, rows, dtype) is None else many
    return kernel.build(plan, rows, pool, dtype, traced)
