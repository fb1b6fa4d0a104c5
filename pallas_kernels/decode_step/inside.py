"""What a step leaves between its phases, read from the memory of a kernel that recorded."""

import types
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from pallas_kernels.decode_step.common.record import Recorded, RecordLayout
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few_rows
from pallas_kernels.decode_step.many_rows.inputs import InputLayout
from pallas_kernels.decode_step.many_rows.layout import MOST_ROWS, record_layout
from pallas_kernels.decode_step.packed.plan import DOWN, HEAD, StepPlan
from pallas_kernels.decode_step.packed.tile import K_TILE
from pallas_kernels.decode_step.ptx.formats import FORMATS


class Normed(NamedTuple):
    """What products after a norm take in and are multiplied with, in a step of many rows: attention
    and feed-forward of each layer in turn, then the head.

    Attributes:
        inputs: of the products, exactly.
        scales: of each row, float32; together they are the normed hidden state.
    """

    inputs: Float[np.ndarray, "norms B D"]
    scales: Float[np.ndarray, "norms B"]


class Inside(NamedTuple):
    """The very numbers that later phases take in, in float32 unless said otherwise.

    In a step of few rows the last bit of each is a flag, but for queries. In one of many rows
    attention's results and `ffn_act` are numbers of the format that products are taken in; its
    hidden states are those that its blocks add to.

    Attributes:
        qkv: queries, keys and values, biases added, before the rotation.
        queries: rotated, in the cache's dtype.
        attn_out: attention's results.
        attn_residual: the hidden state after attention.
        ffn_act: silu(gate) * up.
        down_parts: the down projection's sums over each part of its columns.
        part_columns: the first column of each part, and their number.
        hidden: the embeddings, then the hidden state after each layer.
        normed: of many rows alone.
    """

    qkv: Float[np.ndarray, "L B QKV"]
    queries: Float[np.ndarray, "L B N H"]
    attn_out: Float[np.ndarray, "L B NH"]
    attn_residual: Float[np.ndarray, "L B D"]
    ffn_act: Float[np.ndarray, "L B F"]
    down_parts: Float[np.ndarray, "L parts B D"]
    part_columns: tuple[int, ...]
    hidden: Float[np.ndarray, "states B D"]
    normed: Normed | None


def read(
    scratch: Int[np.ndarray, " words"],
    plan: StepPlan,
    rows: int,
    cache: DTypeLike,
    kernel: types.ModuleType,
) -> Inside:
    """What a kernel that recorded kept.

    Args:
        scratch: the kernel's third result.
        cache: the cache's dtype.
        kernel: the one that ran.
    """
    shape, few = plan.shape, kernel is few_rows
    query = shape.heads * shape.head_dim
    columns = np.minimum(plan.phases[DOWN].part_begin * K_TILE, shape.ffn)
    inputs = InputLayout(rows, plan.phases[HEAD].format)
    layout = RecordLayout.of(plan, rows) if few else record_layout(plan, inputs)
    words = scratch[len(scratch) - layout.total :]
    name = next(name for name, each in FORMATS.items() if each is inputs.format)

    def floats(what: Recorded, *dims: int) -> np.ndarray:
        return layout.floats(words, what, *dims).copy()

    def taken(what: Recorded, width: int, scale: float = 1.0) -> np.ndarray:
        """A product's input."""
        if few:
            return floats(what, rows, width)
        halves = layout.halves(words, what, jnp.dtype(name))
        numbers = halves[:, inputs.places(width)].astype(np.float32)
        return numbers / np.float32(scale)

    normed = None
    if not few:
        scales = floats(Recorded.SCALES, MOST_ROWS)[:, :rows]
        normed = Normed(taken(Recorded.NORMED, shape.hidden), scales)
    queries = layout.halves(words, Recorded.QUERIES, jnp.dtype(cache))[:, : rows * query]
    return Inside(
        floats(Recorded.QKV, rows, shape.qkv),
        queries.reshape(-1, rows, shape.heads, shape.head_dim).copy(),
        taken(Recorded.ATTN_OUT, query),
        floats(Recorded.ATTN_RESIDUAL, rows, shape.hidden),
        taken(Recorded.FFN_ACT, shape.packed_ffn, inputs.format.scale)[..., : shape.ffn],
        floats(Recorded.DOWN_PARTS, plan.phases[DOWN].parts, rows, shape.hidden),
        tuple(int(column) for column in columns),
        floats(Recorded.HIDDEN, rows, shape.hidden),
        normed,
    )
