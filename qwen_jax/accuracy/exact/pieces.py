"""An operation in pieces, one to a thread: of the outputs where a matrix is multiplied, of the
positions elsewhere. A piece is made from beginning to end before its thread takes another one."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
    product = compute in (linear, project)
    if product:
        pieces = list(_of_outputs(compute is project, whole))
    else:
        pieces = list(_of_rows(compute in (scores, mix), whole))
    if len(pieces) == 1:
        return function(whole)
    made = spread.each(function, pieces)
    return tuple(spread.joined(x, axis=int(product)) for x in zip(*made, strict=True))


def _of_outputs(heads: bool, whole: Piece) -> Iterator[Piece]:
    count, width = whole.params[0].shape
    unit = whole.ctx.config.head_dim if heads else 1
    for some in spread.slices(count, unit, MOST // width):
        yield whole._replace(params=tuple(p[some] for p in whole.params))


def _of_rows(attends: bool, whole: Piece) -> Iterator[Piece]:
    """Where queries attend, keys and values are those of every position; and where slots hold
    others' than their own, each looks at all calls."""
    ctx = whole.ctx
    count, width = len(ctx.tokens), max((value[:1].size for value, _ in whole.inputs), default=1)
    if attends:
        width = max(width, ctx.config.num_heads * len(whole.inputs[1][0]))
    for rows in [slice(count)] if ctx.knobs.held is not None else spread.parts(count, width):
        some = dataclasses.replace(ctx, calls=ctx.calls[rows], tokens=ctx.tokens[rows])
        inputs = [_cut(value, rows) for value in whole.inputs]
        if attends:
            inputs[1] = whole.inputs[1]
        yield whole._replace(ctx=some, inputs=inputs)


def _cut(pair: tuple[Array, Error], rows: slice) -> tuple[Array, Error]:
    value, error = pair
    return value[rows], error[rows] if isinstance(error, np.ndarray) else error
