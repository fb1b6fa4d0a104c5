"""An operation in pieces, one to a thread: of the outputs where a matrix is multiplied, of the
positions elsewhere. A piece is made from beginning to end before its thread takes another one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qwen_jax.accuracy import spread
from qwen_jax.accuracy.exact.operations import (
    OPERATIONS,
    Context,
    linear,
    lookup,
    mix,
    project,
    scores,
)

Array = np.ndarray
Error = Float[np.ndarray, "..."] | float
"""Of an input: an array like it, or 0 where it is known exactly."""

MOST = 1 << 21
"""Values of a matrix in one piece, 16 MB: a bound takes their squares, and a head's would take
1.1 GB."""


class Piece(NamedTuple):
    """What one piece is made of: inputs with how far they may be off, and parameters."""

    ctx: Context
    inputs: Sequence[tuple[Array, Error]]
    params: Sequence[Array]

    def value(self, name: str) -> Array:
        """The operation's result, of this piece."""
        return OPERATIONS[name](self.ctx, [value for value, _ in self.inputs], self.params)


def evaluate(name: str, ctx: Context, inputs: Sequence[Array], params: Sequence[Array]) -> Array:
    """Operation `name` of exact inputs."""
    whole = Piece(ctx, [(x, 0.0) for x in inputs], params)
    (value,) = in_pieces(lambda piece: (piece.value(name),), name, whole)
    return value


def in_pieces(
    function: Callable[[Piece], tuple[Array, ...]], name: str, whole: Piece
) -> tuple[Array, ...]:
    """What `function` makes of all pieces of operation `name`: arrays like the operation's result,
    joined. Parameters, held in whatever dtype, are in float64 in a piece."""
    compute = OPERATIONS[name].compute
    if compute in (linear, project):
        count, width = whole.params[0].shape
        unit = whole.ctx.config.head_dim if compute is project else 1
        outputs = spread.slices(count, unit, MOST // width)
        places = [slice(some.start // unit, some.stop // unit) for some in outputs]

        def product(some: slice) -> tuple[Array, ...]:
            return function(_wide(whole, some))

        return spread.gathered(product, outputs, places, axis=1)
    if compute is lookup:  # of a table only what is looked up
        ids, at = np.unique(whole.ctx.tokens, return_inverse=True)
        ctx = dataclasses.replace(whole.ctx, tokens=at)
        whole = whole._replace(ctx=ctx, params=[whole.params[0][ids]])
    whole = _wide(whole, slice(None))
    places = _rows(compute in (scores, mix), whole)
    pieces = [_of_rows(rows, compute in (scores, mix), whole) for rows in places]
    return spread.gathered(function, pieces, places)


def _wide(whole: Piece, some: slice) -> Piece:
    """With some rows of its parameters, in float64."""
    return whole._replace(params=[np.asarray(p[some], np.float64) for p in whole.params])


def _rows(attends: bool, whole: Piece) -> list[slice]:
    """Of each piece. Where slots hold others' than their own, each looks at all calls."""
    ctx, values = whole.ctx, [value for value, _ in whole.inputs]
    count = len(values[0] if values else ctx.tokens)
    width = max((value[:1].size for value in values), default=1)
    if attends:
        width = max(width, ctx.config.num_heads * len(values[1]))
    return [slice(count)] if ctx.knobs.held is not None else spread.parts(count, width)


def _of_rows(rows: slice, attends: bool, whole: Piece) -> Piece:
    """Where queries attend, keys and values are those of every position."""
    ctx = whole.ctx
    some = dataclasses.replace(ctx, calls=ctx.calls[rows], tokens=ctx.tokens[rows])
    inputs = [_cut(value, rows) for value in whole.inputs]
    if attends:
        inputs[1] = whole.inputs[1]
    return whole._replace(ctx=some, inputs=inputs)


def _cut(pair: tuple[Array, Error], rows: slice) -> tuple[Array, Error]:
    value, error = pair
    return value[rows], error[rows] if isinstance(error, np.ndarray) else error
