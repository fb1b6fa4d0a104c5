"""Parameters put into a weight stream one after the other, of one device or of several.

So a device never holds more than its stream and two parameters.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGMLQuantizationType
from jaxtyping import Array, Float, Int, UInt8, UInt32

from pallas_kernels.decode_step import GATE_UP, HEAD, Packed, StepPlan
from qwen_jax.config import ModelConfig
from qwen_jax.weights.on_device import Raw, decoded

MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
"""A layer's matrices, in the order of the kernel's phases."""

Put = Callable[
    [UInt32[Array, "n words"], Int[np.ndarray, " tiles"], tuple[jax.Array, ...], int, str],
    UInt32[Array, "n words"],
]
"""Puts a phase's matrix, whose rows come in pieces, at these tiles of a stream, in a storage."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockRows:
    """A matrix whose rows are looked up, in a file's blocks."""

    raw: UInt8[Array, "V bytes"]
    kind: GGMLQuantizationType = dataclasses.field(metadata={"static": True})

    def __getitem__(self, rows: Any) -> Float[Array, "*T D"]:
        found = self.raw[rows]
        return decoded(found.reshape(-1), self.kind).reshape(*found.shape[:-1], -1)


def pack_all(
    config: ModelConfig,
    parameters: Iterable[tuple[str, jax.Array | Raw]],
    plan: StepPlan,
    stream: UInt32[Array, "n words"],
    offsets: tuple[Int[Array, "L tiles"], ...],
    embed: GGMLQuantizationType | None,
    put: Put,
) -> "tuple[Packed, Float[Array, 'V D'] | BlockRows | None]":
    """Packs each parameter as it comes and lets it go.

    Args:
        parameters: of those that stay in blocks the bytes of each of their sources.
        stream: an empty one, which is used up.
        offsets: the plan's, on the stream's devices.
        embed: the type of an embedding that is not the head and comes as bytes.

    Returns:
        What the kernel reads, and the embedding where it is not the head.
    """
    small: dict[str, Any] = {}
    head = "embed" if config.tied else "lm_head"
    for name, value in parameters:
        layer, matrix = (*name.split("."), "", "")[1:3]
        if name == head:
            stream = _put(plan, stream, value, HEAD, 0, put)
        elif matrix in MATRICES and name.endswith("weight"):
            stream = _put(plan, stream, value, MATRICES.index(matrix), int(layer), put)
        else:
            small[name] = value
    if embed is not None:
        (raw,) = small["embed"]
        small["embed"] = BlockRows(raw, embed)
    layers = range(config.num_layers)
    bias = [small[f"layers.{i}.qkv_proj.bias"] for i in layers]
    norms = [small[f"layers.{i}.{n}"] for i in layers for n in ("attn_norm", "ffn_norm")]
    packed = Packed(
        stream,
        jnp.stack(bias).astype(jnp.float32),
        jnp.stack([*norms, small["final_norm"]]).astype(jnp.float32),
        offsets,
    )
    return packed, small.get("embed")


def _put(
    plan: StepPlan,
    stream: UInt32[Array, "n words"],
    value: jax.Array | Raw,
    phase: int,
    layer: int,
    put: Put,
) -> UInt32[Array, "n words"]:
    """A phase's matrix, as numbers or as the bytes of its sources, which may be stored otherwise
    each, but for gate and up, whose rows alternate."""
    stored = plan.stored(phase, layer)
    if phase == GATE_UP or not isinstance(value, tuple):
        whole = value if isinstance(value, tuple) else (value,)
        return put(stream, plan.at(phase, layer), whole, phase, stored[0])
    for segment, (raw, name) in enumerate(zip(value, stored, strict=True)):
        stream = put(stream, plan.at(phase, layer, segment), (raw,), phase, name)
    return stream
