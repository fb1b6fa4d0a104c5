"""Integers of 4 and 8 bits with zero points, as AWQ and GPTQ make them, in blocks of 32 inputs.

Their files store a matrix as [in, out] and a scale and a zero point for 32 inputs or more of an
output. Here a block has those of its group: d in float16, the zero point in a byte, a byte that
says nothing, and the codes; of 4 bits the first 16 inputs' are the low half bytes.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from pallas_kernels.decode_step.packed.blocks import Blocks
from pallas_kernels.decode_step.packed.scales import Fields, Zeros

BLOCK = 32
HEAD_BYTES = 4
"""In front of a block's codes."""


def _parse(block: UInt8[Array, "n blocks bytes"]) -> Fields:
    codes = block[..., HEAD_BYTES:]
    if codes.shape[-1] < BLOCK:
        codes = jnp.concatenate([codes & np.uint8(0x0F), codes >> 4], axis=-1)
    low, high = (block[..., at].astype(jnp.uint16) for at in (0, 1))
    return {"codes": codes, "d": low | high << 8, "zeros": block[..., 2]}


FORMATS = (
    Blocks("int4", HEAD_BYTES + BLOCK // 2, BLOCK, _parse, (4,), Zeros()),
    Blocks("int8", HEAD_BYTES + BLOCK, BLOCK, _parse, (8,), Zeros(128), offset=128),
)
