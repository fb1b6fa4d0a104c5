"""Weights as `decode_step` reads them: one stream of tiles, packed once and read by prefill too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt32

from pallas_kernels.decode_step.packed.plan import GATE_UP, HEAD, StepPlan
from pallas_kernels.decode_step.packed.storages import STORAGES
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE

TileOffsets = tuple[Int[Array, "2 tiles"], ...]
"""`StepPlan.tile_offsets` of every phase: data, since as constants they would be compiled 100
times."""


class Packed(NamedTuple):
    """What a step reads of a model.

    Attributes:
        stream: the weight matrices, tile after tile in the order of `StepPlan`, each as its phase's
            storage has it.
        bias: of q, k and v, float32.
        norms: attention and feed-forward norm of each layer in turn, then the final one.
        tile_offsets: where each phase's tiles lie in the stream.
    """

    stream: UInt32[Array, "granules words"]
    bias: Float[Array, "L QKV"]
    norms: Float[Array, "norms D"]
    tile_offsets: TileOffsets

    def at(self, phase: int, layer: int = 0) -> Int[Array, "tiles"]:
        """Where the tiles of a phase's matrix begin in the stream."""
        return _at(self.tile_offsets[phase], layer)

    def matrix(self, plan: StepPlan, phase: int, layer: int = 0) -> Float[Array, "out in"]:
        """A matrix read back from the stream."""
        p = plan.phases[phase]
        tiles = self._numbers(plan, phase, self.at(phase, layer))
        grid = tiles.reshape(p.m_tiles, p.across, 2, 8, K_TILE).transpose(0, 2, 3, 1, 4)
        if phase == GATE_UP:
            grid = grid.swapaxes(0, 1)
        return grid.reshape(p.out, p.columns)

    def embeddings(self, plan: StepPlan, tokens: Int[Array, "B"]) -> Float[Array, "B D"]:
        """The tokens' rows of the head, which is the embedding where the head is tied."""
        across, count = plan.phases[HEAD].across, tokens.shape[0]
        at = self.at(HEAD).reshape(-1, across)[tokens // M_TILE]
        tiles = self._numbers(plan, HEAD, at.reshape(-1)).reshape(count, across, M_TILE, K_TILE)
        return tiles[jnp.arange(count), :, tokens % M_TILE].reshape(count, -1)

    def _numbers(self, plan: StepPlan, phase: int, at: Int[Array, "n"]) -> Float[Array, "n 16 128"]:
        """Of the phase's tiles that begin there."""
        p = plan.phases[phase]
        words = self.stream[_granules(at, p.granules)]
        return p.storage.numbers(words.reshape(len(at), -1))


def empty_stream(plan: StepPlan) -> UInt32[Array, "granules words"]:
    return jnp.zeros(plan.stream_shape, jnp.uint32)


def tile_offsets(plan: StepPlan) -> TileOffsets:
    return tuple(jnp.asarray(plan.tile_offsets(phase)) for phase in range(len(plan.phases)))


def _at(offsets: Int[Array, "2 tiles"], layer: int | Int[Array, ""]) -> Int[Array, "tiles"]:
    return offsets[0] + layer * offsets[1]


def _granules(at: Int[Array, "n"], count: int) -> Int[Array, "n count"]:
    """Those of tiles that begin there."""
    return at[:, None] + jnp.arange(count, dtype=at.dtype)


def _put_matrix(
    stream: UInt32[Array, "granules words"],
    offsets: Int[Array, "2 n"],
    matrix: Shaped[Array, "out width"],
    layer: Int[Array, ""],
    phase: int,
    stored: str,
) -> UInt32[Array, "granules words"]:
    storage, (out, width) = STORAGES[stored], matrix.shape
    m_tiles = out // M_TILE
    across = offsets.shape[1] // m_tiles
    # An M-tile of gate and up holds eight outputs of each, so that their product is made in place.
    halves = (2, m_tiles) if phase == GATE_UP else (m_tiles, 2)
    grid = matrix.reshape(*halves, 8, across, width // across)
    if phase == GATE_UP:
        grid = grid.swapaxes(0, 1)
    pieces = grid.transpose(0, 3, 1, 2, 4).reshape(-1, M_TILE, width // across)
    words = storage.words(pieces).reshape(len(pieces), -1, stream.shape[1])
    at = _granules(_at(offsets, layer), words.shape[1])
    return stream.at[at].set(words, unique_indices=True)


put_matrix = jax.jit(_put_matrix, donate_argnums=0, static_argnums=(4, 5))
"""Puts a phase's matrix, as its storage takes it, at its tile offsets in one layer; the stream is
donated."""
