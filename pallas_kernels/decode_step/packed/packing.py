"""Weights as `decode_step` reads them: one stream of tiles, packed once and read by prefill too."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt32

from pallas_kernels.decode_step.packed.plan import GATE_UP, HEAD, StepPlan
from pallas_kernels.decode_step.packed.storages import STORAGES
from pallas_kernels.decode_step.packed.tile import K_TILE, M_TILE


class Packed(NamedTuple):
    """What a step reads of a model.

    Attributes:
        stream: the weight matrices, tile after tile in the order of `StepPlan`, each as its storage
            has it.
        bias: of q, k and v, float32.
        norms: attention and feed-forward norm of each layer in turn, then the final one.
        tile_offsets: `StepPlan.tile_offsets`: data, since as constants they would be compiled 100
            times.
    """

    stream: UInt32[Array, "granules words"]
    bias: Float[Array, "L QKV"]
    norms: Float[Array, "norms D"]
    tile_offsets: tuple[Int[Array, "rows each"], ...]

    def at(
        self, plan: StepPlan, phase: int, layer: int = 0, segment: int = 0
    ) -> Int[Array, " tiles"]:
        """Where the tiles of a segment of a phase's matrix begin in the stream."""
        begin: Int[Array, all] = plan.begin(self.tile_offsets, phase, layer)
        return begin[plan.tiles_of(phase, segment)]

    def matrix(self, plan: StepPlan, phase: int, layer: int = 0) -> Float[Array, "out in"]:
        """A matrix read back from the stream."""
        found = [
            self._numbers(plan, name, self.at(plan, phase, layer, segment))
            for segment, name in enumerate(plan.stored(phase, layer))
        ]
        dtype = jnp.result_type(*found)
        tiles = jnp.concatenate([numbers.astype(dtype) for numbers in found])
        matrix: Float[Array, "out in"] = in_order(plan, phase, tiles)
        return matrix

    def embeddings(self, plan: StepPlan, tokens: Int[Array, "B"]) -> Float[Array, "B D"]:
        """The tokens' rows of the head, which is the embedding where the head is tied."""
        across, count = plan.phases[HEAD].across, tokens.shape[0]
        at = self.at(plan, HEAD).reshape(-1, across)[tokens // M_TILE]
        tiles = self._numbers(plan, plan.head, at.reshape(-1))
        tiles = tiles.reshape(count, across, M_TILE, K_TILE)
        return tiles[jnp.arange(count), :, tokens % M_TILE].reshape(count, -1)

    def _numbers(
        self, plan: StepPlan, stored: str, at: Int[Array, "n"]
    ) -> Float[Array, "n 16 128"]:
        """Of tiles stored so that begin there."""
        words = self.stream[_granules(at, plan.granules(stored))]
        return STORAGES[stored].numbers(words.reshape(len(at), -1))


def in_order(plan: StepPlan, phase: int, tiles: Any) -> Any:
    """A phase's matrix from all of its tiles, M-tile after M-tile."""
    p = plan.phases[phase]
    grid = tiles.reshape(p.m_tiles, p.across, 2, 8, K_TILE).transpose(0, 2, 3, 1, 4)
    if phase == GATE_UP:
        grid = grid.swapaxes(0, 1)
    out, columns = plan.shape.matrices[phase]
    halves = 2 if phase == GATE_UP else 1
    whole = grid.reshape(halves, p.out // halves, p.columns)
    return whole[:, : out // halves, :columns].reshape(out, columns)


def own_outputs(plan: StepPlan, phase: int, y: Any) -> Any:
    """A phase's outputs, `[..., out]`, without those that pad them in the stream."""
    out, _ = plan.shape.matrices[phase]
    halves = 2 if phase == GATE_UP else 1
    grid = y.reshape(*y.shape[:-1], halves, plan.phases[phase].out // halves)
    return grid[..., : out // halves].reshape(*y.shape[:-1], out)


def empty_stream(plan: StepPlan) -> UInt32[Array, "granules words"]:
    return jnp.zeros(plan.stream_shape, jnp.uint32)


def tile_offsets(plan: StepPlan) -> tuple[Int[Array, "rows each"], ...]:
    return tuple(map(jnp.asarray, plan.tile_offsets))


def _granules(at: Int[Array, "*n"], count: int) -> Int[Array, "*n count"]:
    """Those of tiles that begin there."""
    return at[..., None] + jnp.arange(count, dtype=at.dtype)


def _put_matrix(
    stream: UInt32[Array, "granules words"],
    at: Int[Array, "m_tiles across"],
    matrix: Shaped[Array, "out width"],
    halves_apart: bool,
    stored: str,
) -> UInt32[Array, "granules words"]:
    storage, (m_tiles, across) = STORAGES[stored], at.shape
    pieces = across // storage.tiles
    # An M-tile of gate and up holds eight outputs of each, so that their product is made in place.
    halves = (2, m_tiles) if halves_apart else (m_tiles, 2)
    grid = _padded(matrix, m_tiles * M_TILE, pieces * storage.piece, storage.piece, halves_apart)
    grid = grid.reshape(*halves, 8, pieces, storage.piece)
    if halves_apart:
        grid = grid.swapaxes(0, 1)
    rows = grid.transpose(0, 3, 1, 2, 4).reshape(-1, M_TILE, storage.piece)
    words = storage.words(rows).reshape(m_tiles, across, -1, stream.shape[1])
    return stream.at[_granules(at, words.shape[2])].set(words, unique_indices=True)


def _padded(
    matrix: Shaped[Array, "out width"], rows: int, columns: int, piece: int, halves_apart: bool
) -> Shaped[Array, "rows columns"]:
    """With zeros up to whole tiles: after each half's outputs, and after an output's inputs."""
    halves = 2 if halves_apart else 1
    out, width = matrix.shape
    more, wider = (rows - out) // halves, columns - width
    most = K_TILE if halves_apart else 1
    if out % halves or not (0 <= more < most and 0 <= wider < piece):
        raise ValueError(f"a matrix of {out} x {width} is not one of {rows} x {columns}")
    grid = jnp.pad(matrix.reshape(halves, -1, width), ((0, 0), (0, more), (0, wider)))
    return grid.reshape(rows, columns)


put_matrix = jax.jit(_put_matrix, donate_argnums=0, static_argnums=(3, 4))
"""Puts a matrix, as the storage of that name takes it, at the tiles of `StepPlan.at`, which it is
padded to fill; the stream is donated. `halves_apart` is for gate and up."""
