"""Q8_0 in planes: the whole numbers q of a tile's weights d q, then its scales d.

A file has blocks of 34 bytes, of 32 inputs of an output: d in float16, then 32 q of 8 bits (ggml's
`block_q8_0`), of which none lies where a lane could load it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt8, UInt32

from pallas_kernels.decode_step.packed.fragments import apart, fragments, joined, whole
from pallas_kernels.decode_step.packed.storage import Storage
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE, WARPS
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.arithmetic import signed_bytes
from pallas_kernels.decode_step.ptx.formats import FORMATS, Format
from pallas_kernels.decode_step.ptx.thread import V

GROUP = 32
"""Inputs that have one scale: those of two warps."""
GROUPS = K_TILE // GROUP
BLOCK_BYTES = 2 + GROUP
QUANT_BYTES = M_TILE * K_TILE
FLOAT16 = FORMATS["float16"]


class Q8_0(Storage):
    """A tile is its q + 128, a byte each, in the order of `fragments`; then its d, in float16, in
    the order [group, g, half], of output 8 half + g.

    A lane's eight weights are two words, and the two scales of its sums are one. Since q is exact
    in float16, no weight is rounded: products of q are added up in float32, then multiplied by d.
    """

    def __init__(self) -> None:
        self.name = "q8_0"
        self.tile_bytes = QUANT_BYTES + M_TILE * GROUPS * 2
        # As wide as d q is, and as an input that enters with its rest nearly is.
        self.dtype = self.inputs = jnp.dtype(jnp.float32)
        self.format = FLOAT16

    def words(self, tiles: UInt8[Array, "n 16 136"]) -> UInt32[Array, "n 544"]:
        blocks = tiles.reshape(len(tiles), M_TILE, GROUPS, BLOCK_BYTES)
        quants = (blocks[..., 2:] ^ 0x80).reshape(len(tiles), M_TILE, K_TILE)
        d = blocks[..., 0].astype(jnp.uint32) | blocks[..., 1].astype(jnp.uint32) << 8
        scales = (d[:, :8] | d[:, 8:] << 16).swapaxes(1, 2).reshape(len(tiles), -1)
        return jnp.concatenate([fragments(joined(quants)), scales], axis=1)

    def numbers(self, words: UInt32[Array, "n 544"]) -> Float32[Array, "n 16 128"]:
        quants = apart(whole(words[:, : QUANT_BYTES // 4]), jnp.dtype(jnp.uint8)) ^ 0x80
        grouped = quants.astype(jnp.int8).reshape(len(words), M_TILE, GROUPS, GROUP)
        both = words[:, QUANT_BYTES // 4 :].reshape(len(words), GROUPS, 8).swapaxes(1, 2)
        bits = jnp.concatenate([both & 0xFFFF, both >> 16], axis=1).astype(jnp.uint16)
        d = lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
        return (d[..., None] * grouped).reshape(len(words), M_TILE, K_TILE)

    def load(self, tiles: V, warp: V, lane: V, there: Sequence[V | None]) -> list[list[V]]:
        quants, scales = (tiles + offset for offset in _offsets(warp, lane))
        return [
            [
                *t.load_shared(quants + n * self.tile_bytes, 2, each),
                *t.load_shared(scales + n * self.tile_bytes, 1, each),
            ]
            for n, each in enumerate(there)
        ]

    def operand(self, words: list[V]) -> list[V]:
        first, second = (signed_bytes(word) for word in words[:2])
        return [first[0], second[0], first[1], second[1]]

    def expands_to(self, dtype: str) -> bool:
        return dtype in FORMATS

    def fetch(self, tile: V, thread: V, there: V) -> list[V]:
        offsets = _offsets(thread // t.WARP, thread % t.WARP)
        quants, scales = (tile + offset.wide() for offset in offsets)
        return [*t.load_global(quants, 2, where=there), *t.load_global(scales, where=there)]

    def expanded(self, words: list[V], format: Format) -> list[V]:
        found = []
        for four, d in zip(words[:2], FLOAT16.floats(words[2]), strict=True):
            pairs = (FLOAT16.floats(pair) for pair in signed_bytes(four))
            found += [format.pair(low * d, high * d) for low, high in pairs]
        return found

    def scales(self, words: list[V]) -> list[V]:
        low, high = FLOAT16.floats(words[2])
        return [low, low, high, high]


def _offsets(warp: V, lane: V) -> tuple[V, V]:
    """Where in a tile a lane's two words of q lie, and its word of d."""
    quants = warp * (QUANT_BYTES // WARPS) + lane * 8
    return quants, warp // (GROUP // 16) * 32 + lane // 4 * 4 + QUANT_BYTES
