"""What loaders do to tensors: each fault makes, of the right tensor, what a faulty loader holds.

A fault yields variants, each with a word on what it did. Whether one is the cause is decided by
comparing: it must reproduce the candidate's values to within rounding.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from qwen_jax.accuracy import transforms
from qwen_jax.accuracy.measures.residuals import rounding
from qwen_jax.accuracy.weights.checkpoint_values import CheckpointValues
from qwen_jax.config import ModelConfig

_STEP = 1 << 20
"""Values held in float64 at once."""

Role = Literal["embed", "head", "norm", "q", "k", "v", "bias_q", "bias_k", "bias_v", "matrix"]
Variant = tuple[str, Float[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, or rows [start, stop) of it, and what a fault may need of it."""

    name: str
    role: Role
    config: ModelConfig
    source: CheckpointValues
    start: int = 0
    stop: int | None = None

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop is None

    @property
    def block(self) -> int:
        """Values in a quantised block; 1 where the type has none."""
        return self.source.block(self.name)

    def values(self) -> Float[np.ndarray, "rows ..."]:
        return self.source.rows(self.name, self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class WeightFault:
    """A fault of a loader.

    Attributes:
        line: what happened, in words for a reader.
        reference: row of the catalogue of known faults, where it has one.
        plant: the right tensor, and what the candidate holds (only constants are read off it)
            to what a faulty loader would hold.
        local: rows are spoilt one by one, so the fault may be searched in a few of them.
    """

    name: str
    line: str
    plant: Callable[[Tensor, Shaped[np.ndarray, "..."]], Iterator[Variant]]
    local: bool = True
    reference: str = ""


def _zeroed(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    yield "", np.zeros_like(tensor.values())


def _ones(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    yield "", np.ones_like(tensor.values())


def _first_block(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    values, block = tensor.values(), tensor.block
    if block == 1 or values.ndim == 1:
        return
    blocks = values.reshape(len(values), -1, block)
    first = np.zeros_like(blocks)
    first[0, 0] = blocks[0, 0]
    yield "of the tensor, the rest is zero", first.reshape(values.shape)
    yield "of each row, the rest is zero", transforms.first_block(values, block)
    yield (
        "of the tensor, repeated",
        np.broadcast_to(blocks[:1, :1], blocks.shape).reshape(values.shape),
    )
    yield (
        "of each row, repeated",
        np.broadcast_to(blocks[:, :1], blocks.shape).reshape(values.shape),
    )


def _transposed(tensor: Tensor, candidate: np.ndarray) -> Iterator[Variant]:
    values = tensor.values()
    if values.ndim == 2 and candidate.shape == values.shape[::-1]:
        yield "", values.T


def _dims_reversed(tensor: Tensor, candidate: np.ndarray) -> Iterator[Variant]:
    values = tensor.values()
    if values.ndim == 2 and values.shape[0] != values.shape[1]:  # else it is the transpose
        wrong = values.reshape(values.shape[::-1])
        yield "", wrong if candidate.shape == wrong.shape else wrong.T


def _scaled(tensor: Tensor, candidate: np.ndarray) -> Iterator[Variant]:
    values = tensor.values()
    factor = _common(candidate, values, "factor")
    if factor is not None:
        head, width = tensor.config.head_dim, values.shape[-1]
        known = {"1/sqrt(H)": head**-0.5, "sqrt(H)": head**0.5, "sqrt(D)": width**0.5}
        close = [f", {name}" for name, value in known.items() if abs(factor / value - 1) < 1e-3]
        yield f"by {factor:.6g}{''.join(close[:1])}", values * np.float32(factor)


def _shifted(tensor: Tensor, candidate: np.ndarray) -> Iterator[Variant]:
    values = tensor.values()
    shift = _common(candidate, values, "shift")
    if shift is not None:
        yield f"by {shift:.6g}", values + np.float32(shift)


def _norm_plus_one(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    if tensor.role == "norm":
        yield "", tensor.values() + np.float32(1)


def _common(have: np.ndarray, want: np.ndarray, kind: str) -> float | None:
    """The one factor or shift between two arrays, or None.

    Each element allows an interval of them, which rounding can't tell apart; where all intervals
    meet, the middle of what they share is the answer.
    """
    low, high = -np.inf, np.inf
    have, want = have.ravel(), want.ravel()
    for start in range(0, want.size, _STEP):
        part = slice(start, start + _STEP)
        bound = rounding(have[part].astype(np.float32), have.dtype)
        centre, right = have[part].astype(np.float64), want[part].astype(np.float64)
        with np.errstate(all="ignore"):
            if kind == "factor":
                ends = np.stack([(centre - bound) / right, (centre + bound) / right])
                ends = ends[:, right != 0]
            else:
                ends = np.stack([centre - bound, centre + bound]) - right
        low = max(low, ends.min(axis=0).max(initial=-np.inf))
        high = min(high, ends.max(axis=0).min(initial=np.inf))
    return (low + high) / 2 if low <= high and np.isfinite(low + high) else None


def _narrowed(tensor: Tensor, candidate: np.ndarray) -> Iterator[Variant]:
    values = tensor.values()
    with np.errstate(over="ignore"):
        for dtype in (ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn):
            if ml_dtypes.finfo(dtype).bits <= candidate.dtype.itemsize * 8:
                yield np.dtype(dtype).name, values.astype(dtype).astype(np.float32)


def _truncated(tensor: Tensor, candidate: np.ndarray) -> Iterator[Variant]:
    bits = tensor.values().view(np.uint32) & np.uint32(0xFFFF0000)
    yield "to bfloat16", bits.view(np.float32)


def _heads(tensor: Tensor) -> dict[str, int]:
    """The numbers of heads a loader may take for this tensor's: its own, or the other ones."""
    config, role = tensor.config, tensor.role.removeprefix("bias_")
    if role not in ("q", "k") or not tensor.whole:
        return {}
    own = config.num_heads if role == "q" else config.num_kv_heads
    other = config.num_kv_heads if role == "q" else config.num_heads
    rows = own * config.head_dim
    return {"": own} | (
        {f"with {other} heads": other} if other != own and rows % (2 * other) == 0 else {}
    )


def _unpermuted(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    for detail, heads in _heads(tensor).items():
        yield detail, transforms.unpermuted(tensor.values(), heads)


def _permuted(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    for detail, heads in _heads(tensor).items():
        yield detail, transforms.permuted(tensor.values(), heads)


def _tiled_heads(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    """Query heads in the order n % K instead of n // G, as for tiled key/value heads."""
    config = tensor.config
    if tensor.role in ("q", "bias_q") and tensor.whole and config.num_kv_heads > 1:
        values = tensor.values()
        heads = values.reshape(config.num_kv_heads, config.group_size, config.head_dim, -1)
        yield "", heads.swapaxes(0, 1).reshape(values.shape)


def _one_off(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    if tensor.role in ("embed", "head") and tensor.whole:
        for step, which in ((-1, "next"), (1, "previous")):
            yield f"a token has the row of the {which} id", np.roll(tensor.values(), step, axis=0)


DEVICES = (2, 4, 8)
"""Numbers of devices that an engine may deal a model out to."""


def _part_missing(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    yield from _by_columns(tensor, lambda w, n: transforms.first_block(w, w.shape[1] // n))


def _parts_exchanged(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    yield from _by_columns(tensor, transforms.next_parts)


def _by_columns(
    tensor: Tensor, spoil: Callable[[np.ndarray, int], np.ndarray]
) -> Iterator[Variant]:
    values = tensor.values()
    for devices in DEVICES if values.ndim == 2 and tensor.whole else ():
        if values.shape[1] % devices == 0:
            yield f"of {devices} devices", spoil(values, devices)


def _part_twice(tensor: Tensor, _: np.ndarray) -> Iterator[Variant]:
    values = tensor.values()
    for devices in DEVICES if tensor.whole else ():
        for axis, size in enumerate(values.shape):
            if size % devices == 0:
                yield f"of {devices} devices", transforms.first_twice(values, devices, axis)


WHOLE_VALUES = (
    WeightFault(
        "zeroed", "all values are zero: never loaded, or overwritten", _zeroed, reference="5"
    ),
    WeightFault("ones", "all values are one: initialised and never loaded", _ones),
    WeightFault("first-block-only", "only the first block was decoded", _first_block, False, "15"),
    WeightFault("transposed", "rows and columns are exchanged", _transposed, False, "14"),
    WeightFault(
        "dims-reversed",
        "the file's dimensions, fastest first, were read as rows first",
        _dims_reversed,
        False,
        "14",
    ),
    WeightFault("norm-plus-one", "1 was added to a norm's weight, as for Gemma", _norm_plus_one),
    WeightFault("scaled", "all values are multiplied by one number", _scaled),
    WeightFault("shifted", "one number is added to all values", _shifted),
    WeightFault("narrowed", "values went through a narrower dtype", _narrowed),
    WeightFault("truncated", "values were cut to a narrower dtype, not rounded", _truncated),
    WeightFault(
        "rows-unpermuted",
        "rows of each head were un-permuted, as for llama files",
        _unpermuted,
        False,
        "8",
    ),
    WeightFault(
        "rows-permuted",
        "rows of each head were permuted, as llama's converter does",
        _permuted,
        False,
        "9, 10",
    ),
    WeightFault("rows-one-off", "all rows stand one place off:", _one_off, False),
    WeightFault("heads-tiled", "query heads stand in the order n % K", _tiled_heads, False, "20"),
    WeightFault("part-missing", "columns are the first device's alone:", _part_missing, False),
    WeightFault("parts-exchanged", "a device has the next one's columns:", _parts_exchanged, False),
    WeightFault("part-twice", "the second device has the first one's part:", _part_twice, False),
)
"""Faults in the values as a whole, whatever the file's format, likeliest first."""
