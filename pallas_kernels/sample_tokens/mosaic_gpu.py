"""`sample_tokens` as one kernel for Hopper: a cluster of up to eight blocks a row.

Logits are read two times where filters or log-probabilities are asked for, once otherwise, mostly
from the L2 cache. Blocks of a cluster reach each other's shared memory and run at the same time,
so there is nothing to be prepared before a call, and rows beyond the multiprocessors take turns.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import compat
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.lazy import lazy
from pallas_kernels.sample_tokens import instructions as i
from pallas_kernels.sample_tokens.bounds import Bests
from pallas_kernels.sample_tokens.drawing import Drawing
from pallas_kernels.sample_tokens.histogram import Histogram
from pallas_kernels.sample_tokens.meeting import MOST_BLOCKS, SLOT_BYTES, SLOTS, Meeting
from pallas_kernels.sample_tokens.pick import Candidates
from pallas_kernels.sample_tokens.row import BANNED, NOT_FINITE, Outputs, RowSampler
from pallas_kernels.sample_tokens.rows import Choice, Counts, Logprobs, Settings
from pallas_kernels.sample_tokens.scores import QUAD, THREADS, Asked
from pallas_kernels.target import HOPPER

plgpu = lazy("jax.experimental.pallas.mosaic_gpu")

MOST_VOCAB = (1 << 18) - QUAD
"""Tokens whose weights have a sum in 64 bits."""
MOST_TOP = 256
NUMBERS = len(Settings._fields) + 1


def refusal(vocab: int, dtype: jnp.dtype, top_logprobs: int) -> str | None:
    """Why the kernel can't serve these shapes, or None where it can."""
    if dtype.name != "float32":
        return f"its kernel takes float32 logits, not {dtype.name}"
    if vocab % QUAD or vocab > MOST_VOCAB:
        return f"its kernel takes up to {MOST_VOCAB} tokens in fours, not {vocab}"
    if top_logprobs > MOST_TOP:
        return f"its kernel reports up to {MOST_TOP} likeliest tokens, not {top_logprobs}"
    return None


def blocks_a_row(rows: int) -> int:
    """As many as the GPU has room for, and a cluster."""
    most = HOPPER.multiprocessors
    return next(b for b in (MOST_BLOCKS, 4, 2, 1) if b * rows <= most or b == 1)


def shared_bytes() -> int:
    return SLOTS * SLOT_BYTES + Bests.BYTES + Histogram.BYTES + Candidates.BYTES


@functools.cache
def build(
    rows: int, vocab: int, valid: int, top: int, present: tuple[bool, bool, bool]
) -> Callable[..., Any]:
    """The kernel for so many rows.

    Args:
        present: whether there are biases, counts and masks; where not, other arrays stand in.

    Returns a function of (the settings, step, logits, bias, seen, generated, allowed) to (token,
    status, chosen, top ids, top).
    """
    blocks = blocks_a_row(rows)
    has_bias, has_counts, has_allowed = present

    def code(context: Any, *refs: Any) -> None:
        *outside, smem = refs
        at = [t.address(ref) for ref in outside]
        row = t.cta_id() // blocks
        logits, bias, seen, generated, allowed = at[NUMBERS : NUMBERS + 5]
        arrays = (
            logits,
            bias if has_bias else None,
            seen if has_counts else None,
            generated if has_counts else None,
            allowed if has_allowed else None,
        )
        asked = Asked.read(row, vocab, top, at[:NUMBERS], arrays)
        one, several = (row << 2).wide(), row.wide() * (4 * top)
        token, status, chosen, top_ids, tops = at[NUMBERS + 5 :]
        outputs = Outputs(
            token + one, status + one, chosen + one, top_ids + several, tops + several, top
        )
        base = t.address(smem, shared=True)
        meeting, bests = Meeting(blocks, i.rank(), base), base + SLOTS * SLOT_BYTES
        bins = bests + Bests.BYTES
        candidates = Candidates.at(bins + Histogram.BYTES)
        drawing = Drawing(asked, meeting, Histogram(bins, meeting, candidates))
        RowSampler(
            asked, vocab, valid, blocks, meeting, candidates, Bests(bests), drawing, outputs
        ).run()

    def body(*refs: Any) -> None:
        t.emit(code, *refs)

    def out(kind: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    return compat.kernel(
        body,
        name="sample_tokens",
        out_type=(
            out(jnp.int32, rows),
            out(jnp.int32, rows),
            out(jnp.float32, rows),
            out(jnp.int32, rows, top),
            out(jnp.float32, rows, top),
        ),
        grid=(rows,),
        grid_names=("row",),
        cluster=blocks,
        scratch_types=(plgpu.SMEM((shared_bytes() // 4,), jnp.int32),),
        warpgroups=THREADS // t.WARPGROUP,
    )


def sample_tokens(
    logits: Float[Array, "B V"],
    settings: Settings,
    step: Int[Array, "B"],
    bias: Float[Array, "B V"] | None,
    counts: Counts | None,
    allowed: UInt32[Array, "B words"] | None,
    valid_tokens: int,
    top_logprobs: int,
) -> Choice:
    rows, vocab = logits.shape
    present = (bias is not None, counts is not None, allowed is not None)
    kernel = build(rows, vocab, valid_tokens, top_logprobs, present)

    def signed(mask: UInt32[Array, "..."]) -> Int[Array, "..."]:
        return jax.lax.bitcast_convert_type(mask, jnp.int32)

    token, status, chosen, top_ids, top = kernel(
        *settings._replace(seed=signed(settings.seed)),
        step,
        logits,
        logits if bias is None else bias,
        step if counts is None else signed(counts.seen),
        step if counts is None else counts.generated,
        step if allowed is None else signed(allowed),
    )
    return Choice(token, status == BANNED, status != NOT_FINITE, Logprobs(chosen, top_ids, top))
