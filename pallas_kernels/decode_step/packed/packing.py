"""Weights as `decode_step` reads them: one stream of tiles, packed once and read by prefill too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step.packed.plan import GATE_UP, HEAD, K_TILE, M_TILE, StepPlan

TileOffsets = tuple[Int[Array, "2 tiles"], ...]
"""`StepPlan.tile_offsets` of every phase: data, since as constants they would be compiled 100
times."""

WARPS = K_TILE // 16
FRAGMENT = M_TILE * K_TILE // WARPS
"""Numbers of a tile that one warp reads, 16 outputs by 16 inputs, in the order [g, t, half, c]:

output 8 half + g, column 4 t + c. So lane 4 g + t reads eight numbers in a row, which are its
operand of a tensor-core product.
"""
FRAGMENT_BYTES = 2 * FRAGMENT
TILE_BYTES = WARPS * FRAGMENT_BYTES


class Packed(NamedTuple):
    """What a step reads of a model.

    Attributes:
        stream: the weight matrices, tile after tile in the order of `StepPlan`, each in the
            fragments of the eight warps.
        bias: of q, k and v, float32.
        norms: attention and feed-forward norm of each layer in turn, then the final one.
        tile_offsets: where each phase's tiles lie in the stream.
    """

    stream: Float[Array, "tiles 8 256"]
    bias: Float[Array, "L QKV"]
    norms: Float[Array, "norms D"]
    tile_offsets: TileOffsets

    def at(self, phase: int, layer: int = 0) -> Int[Array, "tiles"]:
        """Where the tiles of a phase's matrix lie in the stream."""
        return _at(self.tile_offsets[phase], layer)

    def matrix(self, plan: StepPlan, phase: int, layer: int = 0) -> Float[Array, "out in"]:
        """A matrix read back from the stream."""
        p = plan.phases[phase]
        tiles = self.stream[self.at(phase, layer)]
        grid = tiles.reshape(p.m_tiles, p.across, WARPS, 8, 4, 2, 4).transpose(0, 5, 3, 1, 2, 4, 6)
        if phase == GATE_UP:
            grid = grid.swapaxes(0, 1)
        return grid.reshape(p.out, p.columns)

    def embeddings(self, plan: StepPlan, tokens: Int[Array, "B"]) -> Float[Array, "B D"]:
        """The tokens' rows of the head, which is the embedding where the head is tied."""
        at = self.at(HEAD).reshape(-1, plan.phases[HEAD].across)[tokens // M_TILE]
        tiles = self.stream[at].reshape(*at.shape, WARPS, 8, 4, 2, 4)
        batch = jnp.arange(tokens.shape[0])
        picked = tiles[batch, :, :, tokens % 8, :, tokens % M_TILE // 8]
        return picked.reshape(tokens.shape[0], -1)


def empty_stream(plan: StepPlan, dtype: jnp.dtype) -> Float[Array, "tiles 8 256"]:
    return jnp.zeros((plan.stream_tiles, WARPS, FRAGMENT), dtype)


def tile_offsets(plan: StepPlan) -> TileOffsets:
    return tuple(jnp.asarray(plan.tile_offsets(phase)) for phase in range(len(plan.phases)))


def _at(offsets: Int[Array, "2 tiles"], layer: int | Int[Array, ""]) -> Int[Array, "tiles"]:
    return offsets[0] + layer * offsets[1]


def _put_matrix(
    stream: Float[Array, "tiles 8 256"],
    offsets: Int[Array, "2 n"],
    matrix: Float[Array, "out in"],
    layer: Int[Array, ""],
    phase: int,
) -> Float[Array, "tiles 8 256"]:
    out, columns = matrix.shape
    m_tiles, across = out // M_TILE, columns // K_TILE
    # An M-tile of gate and up holds eight outputs of each, so that their product is made in place.
    halves = (2, m_tiles) if phase == GATE_UP else (m_tiles, 2)
    grid = matrix.reshape(*halves, 8, across, WARPS, 4, 4)
    if phase == GATE_UP:
        grid = grid.swapaxes(0, 1)
    tiles = grid.transpose(0, 3, 4, 2, 5, 1, 6).reshape(-1, WARPS, FRAGMENT)
    return stream.at[_at(offsets, layer)].set(tiles, unique_indices=True)


put_matrix = jax.jit(_put_matrix, donate_argnums=0, static_argnums=4)
"""Puts a phase's matrix at its tile offsets in one layer; the stream is donated."""
