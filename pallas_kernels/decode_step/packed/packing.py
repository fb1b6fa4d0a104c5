"""Weights as `decode_step` reads them: one tape of tiles, packed once and read by prefill too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step.packed.plan import BAND, COLUMNS, GATE_UP, HEAD, Plan

Places = tuple[Int[Array, "2 tiles"], ...]
"""`Plan.places` of every phase: data, since as constants they would be compiled 100 times."""

WARPS = COLUMNS // 16
PIECE = BAND * COLUMNS // WARPS
"""Numbers of a tile that one warp reads, 16 rows by 16 columns, in the order [g, t, half, c]:

row 8 half + g, column 4 t + c. So lane 4 g + t reads eight numbers in a row, which are its
operand of a tensor-core product.
"""


class Packed(NamedTuple):
    """What a step reads of a model.

    Attributes:
        tape: the weight matrices, tile after tile in the order of `Plan`, each in the pieces of
            the eight warps.
        bias: of q, k and v, float32.
        norms: attention and feed-forward norm of each layer in turn, then the final one.
        places: where each phase's tiles lie on the tape.
    """

    tape: Float[Array, "tiles 8 256"]
    bias: Float[Array, "L QKV"]
    norms: Float[Array, "norms D"]
    places: Places

    def at(self, phase: int, layer: int = 0) -> Int[Array, "tiles"]:
        """Where the tiles of a phase's matrix lie on the tape."""
        return _at(self.places[phase], layer)

    def matrix(self, plan: Plan, phase: int, layer: int = 0) -> Float[Array, "rows columns"]:
        """A matrix read back from the tape, `[out, in]`."""
        p = plan.phases[phase]
        tiles = self.tape[self.at(phase, layer)]
        grid = tiles.reshape(p.bands, p.across, WARPS, 8, 4, 2, 4).transpose(0, 5, 3, 1, 2, 4, 6)
        if phase == GATE_UP:
            grid = grid.swapaxes(0, 1)
        return grid.reshape(p.rows, p.columns)

    def head_rows(self, plan: Plan, rows: Int[Array, "B"]) -> Float[Array, "B D"]:
        """Rows of the head, which is an embedding where the head is tied."""
        at = self.at(HEAD).reshape(-1, plan.phases[HEAD].across)[rows // BAND]
        tiles = self.tape[at].reshape(*at.shape, WARPS, 8, 4, 2, 4)
        batch = jnp.arange(rows.shape[0])
        picked = tiles[batch, :, :, rows % 8, :, rows % BAND // 8]
        return picked.reshape(rows.shape[0], -1)


def empty_tape(plan: Plan, dtype: jnp.dtype) -> Float[Array, "tiles 8 256"]:
    return jnp.zeros((plan.tape_tiles, WARPS, PIECE), dtype)


def places(plan: Plan) -> Places:
    return tuple(jnp.asarray(plan.places(phase)) for phase in range(len(plan.phases)))


def _at(places: Int[Array, "2 tiles"], layer: int | Int[Array, ""]) -> Int[Array, "tiles"]:
    return places[0] + layer * places[1]


def _put(
    tape: Float[Array, "tiles 8 256"],
    places: Int[Array, "2 n"],
    matrix: Float[Array, "rows columns"],
    layer: Int[Array, ""],
    phase: int,
) -> Float[Array, "tiles 8 256"]:
    rows, columns = matrix.shape
    bands, across = rows // BAND, columns // COLUMNS
    # A band of gate and up holds eight rows of each, so that their product is made in place.
    halves = (2, bands) if phase == GATE_UP else (bands, 2)
    grid = matrix.reshape(*halves, 8, across, WARPS, 4, 4)
    if phase == GATE_UP:
        grid = grid.swapaxes(0, 1)
    tiles = grid.transpose(0, 3, 4, 2, 5, 1, 6).reshape(-1, WARPS, PIECE)
    return tape.at[_at(places, layer)].set(tiles, unique_indices=True)


put = jax.jit(_put, donate_argnums=0, static_argnums=4)
"""Puts a phase's matrix, `[out, in]`, in its places in one layer; the tape is donated."""
