"""Which of two kernels runs a step: the one of few rows, or the one of many."""

import types
from collections.abc import Callable
from typing import Any

from jax.typing import DTypeLike

from pallas_kernels.decode_step.common.cache import Pool
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few_rows
from pallas_kernels.decode_step.many_rows import mosaic_gpu as many_rows
from pallas_kernels.decode_step.packed.plan import StepPlan

FEW_NUMBERS = 15_000
"""Of an input, up to which the first is faster with weights that are numbers: each block reads all
of them as float32. With blocks it is as far as it goes: it needn't make numbers of them."""


def refusal(plan: StepPlan, rows: int, cache: DTypeLike) -> str | None:
    """Why neither can run a step with a cache of that dtype, or None."""
    if few_rows.refusal(plan, rows, cache) is None:
        return None
    return many_rows.refusal(plan, rows, cache)


def build(
    plan: StepPlan,
    rows: int,
    pool: Pool,
    cache: DTypeLike,
    traced: bool = False,
    recorded: bool = False,
    several: bool = False,
    devices: int = 1,
) -> Callable[..., Any]:
    """The faster one, of those that can, for one model, number of rows, cache size and its dtype.

    Returns a function of (weight stream, table, bias, norms, hidden, rope, pages, block tables,
    positions) to (logits, new keys and values, scratch); and, if traced, the nanosecond at which
    each block ended each of `PHASES`, int32 `[blocks, phases]`. If recorded, the scratch ends with
    what `RecordLayout` says.

    Args:
        several: rows may be several positions of one text. Behind the positions, in `[2, rows]`,
            then stands how many rows before each row are its text's.
        devices: that have the model together, each with a kernel, a stream and a cache of the heads
            that it has; the plan is one device's. Every one makes the logits of all. They run under
            `shard_map`, over a mesh of just these. Such a kernel doesn't record.
    """
    kernel = chosen(plan, rows, cache)
    return kernel.build(plan, rows, pool, cache, traced, recorded, several, devices)


def chosen(plan: StepPlan, rows: int, cache: DTypeLike) -> types.ModuleType:
    """Of the two kernels the faster one, of those that can."""
    short = rows * plan.shape.hidden <= FEW_NUMBERS or any(x.spread > 1 for x in plan.storages)
    few = short or many_rows.refusal(plan, rows, cache)
    return few_rows if few and few_rows.refusal(plan, rows, cache) is None else many_rows
