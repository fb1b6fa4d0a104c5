"""A whole decode step of up to 64 rows: from embeddings to the logits of the next tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step import inside, kernels
from pallas_kernels.decode_step.common.cache import FEWEST_SLOTS, Pool
from pallas_kernels.decode_step.inside import Inside
from pallas_kernels.decode_step.many_rows.layout import MOST_ROWS
from pallas_kernels.decode_step.packed.packing import Packed, empty_stream, put_matrix, tile_offsets
from pallas_kernels.decode_step.packed.plan import GATE_UP, HEAD, ModelShape, StepPlan, Stored
from pallas_kernels.decode_step.reference import reference
from pallas_kernels.implementation import UnsupportedError, choose

__all__ = [
    "GATE_UP",
    "HEAD",
    "MOST_ROWS",
    "Inside",
    "ModelShape",
    "Packed",
    "StepPlan",
    "Stored",
    "decode_step",
    "empty_stream",
    "of_few_rows",
    "put_matrix",
    "read_inside",
    "recorded",
    "refusal",
    "tile_offsets",
]


def refusal(plan: StepPlan, rows: int, cache: DTypeLike, pairs: int) -> str | None:
    """Why no kernel can run a step that rotates so many pairs of every head, or None.

    Args:
        cache: the cache's dtype.
    """
    if 2 * pairs != plan.shape.head_dim:
        return f"it rotates whole heads, not {2 * pairs} of {plan.shape.head_dim} dimensions"
    return kernels.refusal(plan, rows, cache)


def decode_step(
    packed: Packed,
    plan: StepPlan,
    hidden: Float[Array, "B D"],
    pages: Float[Array, "2L P K C H"],
    tables: Int[Array, "B n"],
    position: Int[Array, "B"],
    inv_freq: Float[Array, "R2"],
    *,
    attention_factor: float = 1.0,
    preceding: Int[Array, "B"] | None = None,
    implementation: str = "auto",
    devices: int = 1,
) -> tuple[Float[Array, "B V"], Float[Array, "2L B K H"]]:
    """Runs one token of every row through every layer and the head.

    There are two kernels. Up to 16 rows of 0.5B, 9 of 1.5B, 7 of 3B and 4 of 7B (of blocks, 9)
    run on one that keeps the whole input of a product in shared memory, up to 64 rows on one that
    lets it stream.

    Sums, norms, softmax and the residual stream are float32; keys, values, queries and
    attention weights are rounded to the cache's dtype where they enter a product. In the kernel of
    many rows all inputs of products with weights are rounded as well, to the dtype they are taken
    in, and so are the numbers that are made of blocks, to float16. The cache is read only: the
    caller writes the new keys and values at `position`. Rows may share pages.

    Args:
        plan: how the weights in `packed` are cut and dealt out.
        hidden: the tokens' embeddings.
        pages: the pool: a page holds keys of C consecutive positions, after rotary embedding, in
            each layer, then values in each layer. C is a power of two, 128 at least. Slots from
            a row's `position` on may hold anything, NaN included.
        tables: of each row the pages that hold positions 0 to C - 1, C to 2 C - 1 and so on; int32.
            Entries beyond `position` may be anything, and are not looked at.
        position: of each row's token, from 0, below n C.
        inv_freq: radians per position of each pair, float32.
        attention_factor: multiplies cos and sin (YaRN; 1 elsewhere).
        preceding: of each row, how many rows just before it are its own text's preceding positions
            of this step, which it attends to as if they were in the cache already: the bits are
            the same. Their slots may hold anything. None where there are no such rows.
        devices: that have the model together, where this is called under `shard_map` over a mesh of
            just these: all but `hidden` and what says where rows are is what one of them has, and
            the logits are of all. Only the kernels do this.

    Returns:
        The logits, float32, and the tokens' keys, then values, in the cache's dtype.

    Raises:
        ValueError: shapes or dtypes disagree.
        UnsupportedError: `implementation` can't serve the case.
    """
    _check(packed, plan, hidden, pages, tables, preceding)
    why_not = refusal(plan, hidden.shape[0], pages.dtype, inv_freq.shape[0])
    with jax.named_scope("decode_step"):
        if choose("decode_step", implementation, why_not) == "xla":
            if devices > 1:
                raise UnsupportedError(
                    f"{devices} devices take a step together only by its kernels"
                )
            inputs = packed, plan, hidden, pages, tables, position, inv_freq
            return reference(*inputs, attention_factor, preceding)
        inputs = packed, plan, hidden, pages, tables, position, inv_freq
        logits, new, _ = _launched(
            *inputs, attention_factor, preceding, recording=False, devices=devices
        )
        return logits, new


def recorded(
    packed: Packed,
    plan: StepPlan,
    hidden: Float[Array, "B D"],
    pages: Float[Array, "2L P K C H"],
    tables: Int[Array, "B n"],
    position: Int[Array, "B"],
    inv_freq: Float[Array, "R2"],
    *,
    attention_factor: float = 1.0,
) -> tuple[Float[Array, "B V"], Float[Array, "2L B K H"], Int[Array, " words"]]:
    """`decode_step` by the same kernel, built to record what its blocks leave for each other.

    Returns:
        Also the kernel's scratch memory, from which `read_inside` reads what it recorded.

    Raises:
        ValueError: shapes or dtypes disagree.
        UnsupportedError: no kernel can serve the case.
    """
    _check(packed, plan, hidden, pages, tables)
    why_not = refusal(plan, hidden.shape[0], pages.dtype, inv_freq.shape[0])
    choose("decode_step", "mosaic_gpu", why_not)
    inputs = packed, plan, hidden, pages, tables, position, inv_freq
    return _launched(*inputs, attention_factor, None, recording=True)


def read_inside(
    scratch: Int[np.ndarray, " words"], plan: StepPlan, rows: int, cache: DTypeLike
) -> Inside:
    """What `recorded` recorded of a step of so many rows, with a cache of that dtype."""
    return inside.read(scratch, plan, rows, cache, kernels.chosen(plan, rows, cache))


def of_few_rows(plan: StepPlan, rows: int, cache: DTypeLike) -> bool:
    """Whether the kernel of few rows runs such a step."""
    return kernels.chosen(plan, rows, cache) is kernels.few_rows


def _check(
    packed: Packed,
    plan: StepPlan,
    hidden: Float[Array, "B D"],
    pages: Float[Array, "2L P K C H"],
    tables: Int[Array, "B n"],
    preceding: Int[Array, "B"] | None = None,
) -> None:
    """Raises ValueError where shapes or dtypes disagree."""
    shape, rows, pool = plan.shape, hidden.shape[0], Pool.of(pages, tables)
    expected = (2 * shape.layers, pool.pages, shape.kv_heads, pool.slots, shape.head_dim)
    if pages.shape != expected or hidden.shape != (rows, shape.hidden):
        raise ValueError(f"hidden {hidden.shape} and pages {pages.shape} don't fit {shape}")
    if packed.stream.shape != plan.stream_shape:
        raise ValueError(f"weights of {packed.stream.shape} don't fit {plan.stream_shape}")
    if pool.pages == 0 or pool.slots < FEWEST_SLOTS or pool.slots & (pool.slots - 1):
        raise ValueError(
            f"{pool.pages} pages of {pool.slots} slots: at least one page, of a power of two of "
            f"slots, {FEWEST_SLOTS} at least, is needed"
        )
    if tables.shape != (rows, pool.table) or pool.table == 0 or tables.dtype != jnp.int32:
        raise ValueError(
            f"the block tables are {tables.dtype} {tables.shape}, not int32 of {rows} rows"
        )
    if preceding is not None and (preceding.shape != (rows,) or preceding.dtype != jnp.int32):
        raise ValueError(
            f"preceding is {preceding.dtype} {preceding.shape}, not int32 of {rows} rows"
        )


def _launched(
    packed: Packed,
    plan: StepPlan,
    hidden: Float[Array, "B D"],
    pages: Float[Array, "2L P K C H"],
    tables: Int[Array, "B n"],
    position: Int[Array, "B"],
    inv_freq: Float[Array, "R2"],
    attention_factor: float,
    preceding: Int[Array, "B"] | None,
    recording: bool,
    devices: int = 1,
) -> tuple[Float[Array, "B V"], Float[Array, "2L B K H"], Int[Array, " words"]]:
    """The kernel's logits, keys and values, and its scratch memory."""
    angles = position[:, None].astype(jnp.float32) * inv_freq
    rope = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1) * attention_factor
    pool = Pool.of(pages, tables)
    several = preceding is not None
    kernel = kernels.build(
        plan,
        hidden.shape[0],
        pool,
        pages.dtype,
        recorded=recording,
        several=several,
        devices=devices,
    )
    at = position if preceding is None else jnp.stack([position, preceding])
    logits, new, scratch = kernel(
        packed.stream,
        plan.table(),
        packed.bias,
        packed.norms,
        hidden.astype(jnp.float32),
        rope,
        pages,
        tables,
        at,
    )
    return logits, new, scratch
