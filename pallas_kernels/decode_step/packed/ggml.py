"""The block formats of GGUF files, bit for bit as ggml-common.h and ggml-quants.c have them.

https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8, UInt16

from pallas_kernels.decode_step.packed.blocks import Blocks, Parse
from pallas_kernels.decode_step.packed.scales import Fields, Halves, Integers

Bytes = UInt8[Array, "n blocks bytes"]
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""`kvalues_iq4nl`."""


def _half(block: Bytes, at: int) -> UInt16[Array, "n blocks"]:
    """The bits of the float16 there."""
    return block[..., at].astype(jnp.uint16) | block[..., at + 1].astype(jnp.uint16) << 8


def _fields(packed: Bytes, bits: int, run: int) -> UInt8[Array, "n blocks codes"]:
    """Codes of so many bits: of each run of bytes the lowest, then the next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(*packed.shape[:-1], -1, 1, run)
    return ((runs >> shifts) & np.uint8((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)


def _simple(minimum: bool, high: bool, bits: int = 4) -> Parse:
    """Blocks of 32: d, m if there is one, the fifth bits if there are, then the lower ones."""

    def parse(block: Bytes) -> Fields:
        at = 4 if minimum else 2
        codes = block[..., at + 4 * high :]
        codes = codes ^ 0x80 if bits == 8 else _fields(codes, 4, 16)
        if high:
            # Bit 8 i + n of the word is bit n of byte i.
            every = block[..., at : at + 4, None] >> np.arange(8, dtype=np.uint8)
            codes = codes | (every.reshape(codes.shape) & 1) << 4
        fields = {"codes": codes, "d": _half(block, 0)}
        return fields | ({"m": _half(block, 2)} if minimum else {})

    return parse


def _six_bits(block: Bytes) -> Fields:
    """The eight scales and minima of Q4_K and Q5_K: bytes 4 to 15."""
    scales, mins, last = (block[..., at : at + 4] for at in (4, 8, 12))
    upper = [(last & 0x0F) | (scales >> 6) << 4, (last >> 4) | (mins >> 6) << 4]
    both = [jnp.concatenate([x & 63, y], -1) for x, y in zip((scales, mins), upper, strict=True)]
    return {"d": _half(block, 0), "dmin": _half(block, 2), "scales": both[0], "mins": both[1]}


def _q2_k(block: Bytes) -> Fields:
    return {
        "codes": _fields(block[..., 16:80], 2, 32),
        "scales": block[..., :16] & 0x0F,
        "mins": block[..., :16] >> 4,
        "d": _half(block, 80),
        "dmin": _half(block, 82),
    }


def _q3_k(block: Bytes) -> Fields:
    low, high = _fields(block[..., 96:104], 4, 8), _fields(block[..., 104:108], 2, 4)
    # Codes 32 n to 32 n + 31 have bit n of the 32 bytes.
    third = _fields(block[..., :32], 1, 32)
    return {
        "codes": _fields(block[..., 32:96], 2, 32) | third << 2,
        "scales": (low | high << 4) - np.uint8(32),
        "d": _half(block, 108),
    }


def _q4_k(block: Bytes) -> Fields:
    return {"codes": _fields(block[..., 16:], 4, 32), **_six_bits(block)}


def _q5_k(block: Bytes) -> Fields:
    low, fifth = _fields(block[..., 48:], 4, 32), _fields(block[..., 16:48], 1, 32)
    return {"codes": low | fifth << 4, **_six_bits(block)}


def _q6_k(block: Bytes) -> Fields:
    low, high = _fields(block[..., :128], 4, 64), _fields(block[..., 128:192], 2, 32)
    return {
        "codes": low | high << 4,
        "scales": block[..., 192:208],
        "d": _half(block, 208),
    }


def _iq4_xs(block: Bytes) -> Fields:
    low, high = _fields(block[..., 4:8], 4, 1), _fields(block[..., 2:4], 2, 1)
    return {
        "codes": _fields(block[..., 8:], 4, 16),
        "scales": (low | high << 4) - np.uint8(32),
        "d": _half(block, 0),
    }


FORMATS = (
    Blocks("q4_0", 18, 32, _simple(False, False), (4,), Halves(), offset=8),
    Blocks("q4_1", 20, 32, _simple(True, False), (4,), Halves(minimum=True)),
    Blocks("q5_0", 22, 32, _simple(False, True), (4, 1), Halves(), offset=16),
    Blocks("q5_1", 24, 32, _simple(True, True), (4, 1), Halves(minimum=True)),
    Blocks("q8_0", 34, 32, _simple(False, False, 8), (8,), Halves(), offset=128),
    Blocks("q2_k", 84, 256, _q2_k, (2,), Integers(16, True)),
    Blocks("q3_k", 110, 256, _q3_k, (2, 1), Integers(16, False, 128), offset=4),
    Blocks("q4_k", 144, 256, _q4_k, (4,), Integers(32, True)),
    Blocks("q5_k", 176, 256, _q5_k, (4, 1), Integers(32, True)),
    Blocks("q6_k", 210, 256, _q6_k, (4, 2), Integers(16, False, 128), offset=32),
    Blocks("iq4_nl", 18, 32, _simple(False, False), (4,), Halves(), table=IQ4),
    Blocks("iq4_xs", 136, 256, _iq4_xs, (4,), Integers(32, False, 128), table=IQ4),
)
"""Those of GGUF that the kernels multiply as they are; named in lower case."""
