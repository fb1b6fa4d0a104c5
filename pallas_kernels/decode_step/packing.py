"""Weights as `decode_step` reads them: one tape of tiles, packed once and read by prefill too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step.plan import COLUMNS, ROWS, Plan

HEAD = 4
"""The phase of the head; those of a layer are 0 QKV, 1 output, 2 gate and up, 3 down."""


Places = tuple[Int[Array, "2 tiles"], ...]
"""`Plan.places` of every phase: data, since as constants they would be compiled 100 times."""


class Packed(NamedTuple):
    """What a step reads of a model.

    Attributes:
        tape: the weight matrices, tile after tile in the order of `Plan`.
        bias: of q, k and v, float32.
        norms: attention and feed-forward norm of each layer in turn, then the final one.
        places: where each phase's tiles lie on the tape.
    """

    tape: Float[Array, "tiles 64 128"]
    bias: Float[Array, "L QKV"]
    norms: Float[Array, "norms D"]
    places: Places

    def matrix(self, plan: Plan, phase: int, layer: int = 0) -> Float[Array, "rows columns"]:
        """A matrix read back from the tape, `[out, in]`."""
        p = plan.phases[phase]
        tiles = self.tape[_at(self.places[phase], layer)]
        grid = tiles.reshape(p.rows // ROWS, p.across, ROWS, COLUMNS)
        return grid.swapaxes(1, 2).reshape(p.rows, p.columns)

    def head_row(self, plan: Plan, row: Int[Array, ""]) -> Float[Array, "D"]:
        """One row of the head, which is an embedding where the head is tied."""
        across = plan.phases[HEAD].across
        places = _at(self.places[HEAD], 0).reshape(-1, across)[row // ROWS]
        return self.tape[places, row % ROWS].reshape(-1)


def empty_tape(plan: Plan, dtype: jnp.dtype) -> Float[Array, "tiles 64 128"]:
    return jnp.zeros((plan.tape_tiles, ROWS, COLUMNS), dtype)


def places(plan: Plan) -> Places:
    return tuple(jnp.asarray(plan.places(phase)) for phase in range(len(plan.phases)))


def _at(places: Int[Array, "2 tiles"], layer: int | Int[Array, ""]) -> Int[Array, "tiles"]:
    return places[0] + layer * places[1]


def _put(
    tape: Float[Array, "tiles 64 128"],
    places: Int[Array, "2 n"],
    matrix: Float[Array, "rows columns"],
    layer: Int[Array, ""],
) -> Float[Array, "tiles 64 128"]:
    rows, columns = matrix.shape
    tiles = matrix.reshape(rows // ROWS, ROWS, columns // COLUMNS, COLUMNS).swapaxes(1, 2)
    tiles = tiles.reshape(-1, ROWS, COLUMNS)
    return tape.at[_at(places, layer)].set(tiles, unique_indices=True)


put = jax.jit(_put, donate_argnums=0)
"""Puts a matrix, `[out, in]`, in its places in one layer; the tape passed in is donated."""
