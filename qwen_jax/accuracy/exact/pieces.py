"""An operation in pieces, one to a thread: of the outputs where a matrix is multiplied, of the
positions elsewhere. A piece is made from beginning to end before its thread takes another one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from qwen_jax.accuracy import spread
from qwen_jax.accuracy.exact.operations import OPERATIONS, Context, linear, mix, project, scores

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
    joined."""
    compute = OPERATIONS[name].compute
    if compute in (linear, project):
        count, width = whole.params[0].shape
        unit = whole.ctx.config.head_dim if compute is project else 1
        some = spread.slices(count, unit, MOST // width)
        pieces = [whole._replace(params=tuple(p[s] for p in whole.params)) for s in some]
        places = [slice(s.start // unit, s.stop // unit) for s in some]
        return spread.gathered(function, pieces, places, axis=1)
    places = _rows(compute in (scores, mix), whole)
    pieces = [_of_rows(rows, compute in (scores, mix), whole) for rows in places]
    return spread.gathered(function, pieces, places)


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
