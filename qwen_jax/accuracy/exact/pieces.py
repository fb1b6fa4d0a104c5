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
from qwen_jax.accuracy.exact.rounding import SMALLEST, UNIT, round_interval

Array = np.ndarray
Error = Float[np.ndarray, "..."] | float
"""Of an input: an array like it, or 0 where it is known exactly."""

LEAST, MOST = 1 << 14, 1 << 21
"""Values of a matrix in one piece, up to 16 MB: a bound takes their squares,"""

MOST_MADE = 1 << 19
"""and holds some eight arrays of as many as it makes, 4 MB each: every core has its own."""

PRODUCTS = (linear, project)
"""Operations that multiply a matrix."""


class Piece(NamedTuple):
    """What one piece is made of: inputs with how far they may be off, and parameters.

    Attributes:
        squares: of a product's input and, where it may be off, of how far; then, where it is
            rounded once more, of what that adds. All pieces share them.
    """

    ctx: Context
    inputs: Sequence[tuple[Array, Error]]
    params: Sequence[Array]
    squares: tuple[Array, ...] = ()

    @property
    def values(self) -> list[Array]:
        return [value for value, _ in self.inputs]

    @property
    def errors(self) -> list[Error]:
        return [error for _, error in self.inputs]

    def value(self, name: str) -> Array:
        """The operation's result, of this piece."""
        return OPERATIONS[name](self.ctx, self.values, self.params)

    def with_squares(self, name: str, storage: float) -> "Piece":
        """With those that the bound of operation `name` takes.

        Args:
            storage: the unit roundoff of activations. What rounds no coarser turns nothing that
                they did not.
        """
        if OPERATIONS[name].compute not in PRODUCTS:
            return self
        operand = self.ctx.knobs.operand

        def squared(rows: slice) -> tuple[Array, ...]:
            value, error = cut(self.inputs[0], rows)
            arrays = [value]
            with np.errstate(all="ignore"):
                if isinstance(error, np.ndarray):
                    if operand and UNIT[operand] > storage:
                        arrays += _turned(value, error, operand)
                    else:
                        arrays.append(error)
                return tuple(np.square(x) for x in arrays)

        value = self.values[0]
        places = spread.parts(len(value), value[:1].size)
        return self._replace(squares=spread.gathered(squared, places, places))


def _turned(value: Array, error: Array, operand: str) -> list[Array]:
    """Of what is rounded once more: how far that may be off for its own error, and for being
    rounded to one number or the next; neither where all that it may be becomes one number."""
    width = round_interval(value, error, operand)[1]
    most = 2 * UNIT[operand] * (np.abs(value) + error) + SMALLEST
    return [np.where((width > 0) | np.isnan(error), error, 0), np.minimum(width, most)]


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
    if compute in PRODUCTS:
        (count, width), rows = whole.params[0].shape, max(len(whole.inputs[0][0]), 1)
        unit = whole.ctx.config.head_dim if compute is project else 1
        most = min(MOST // width, MOST_MADE // rows)
        outputs = spread.slices(count, unit, LEAST // width, most)
        places = [slice(some.start // unit, some.stop // unit) for some in outputs]

        def product(some: slice) -> tuple[Array, ...]:
            return function(_wide(whole, some))

        return spread.gathered(product, outputs, places, axis=1)
    if compute is lookup:  # of a table only what is looked up
        ids, at = np.unique(whole.ctx.tokens, return_inverse=True)
        ctx = dataclasses.replace(whole.ctx, tokens=at)
        whole = whole._replace(ctx=ctx, params=[whole.params[0][ids]])
    whole = _wide(whole, slice(None))
    attends = compute in (scores, mix)
    places = _rows(attends, whole)
    pieces = [_of_rows(rows, attends, whole) for rows in places]
    return spread.gathered(function, pieces, places)


def _wide(whole: Piece, some: slice) -> Piece:
    """With some rows of its parameters, in float64."""
    return whole._replace(params=[np.asarray(p[some], np.float64) for p in whole.params])


def _rows(attends: bool, whole: Piece) -> list[slice]:
    """Of each piece; all in one where slots hold others' than their own, which takes all calls."""
    ctx, values = whole.ctx, [value for value, _ in whole.inputs]
    count = len(values[0] if values else ctx.tokens)
    width = max((value[:1].size for value in values), default=ctx.config.hidden_size)
    if attends:
        width = max(width, ctx.config.num_heads * len(values[1]))
    return [slice(count)] if ctx.knobs.held is not None else spread.parts(count, width)


def _of_rows(rows: slice, attends: bool, whole: Piece) -> Piece:
    """Where queries attend, keys and values are those of every position."""
    ctx = whole.ctx
    some = dataclasses.replace(ctx, calls=ctx.calls[rows], tokens=ctx.tokens[rows])
    inputs = [cut(value, rows) for value in whole.inputs]
    if attends:
        inputs[1] = whole.inputs[1]
    return whole._replace(ctx=some, inputs=inputs)


def cut(pair: tuple[Array, Error], rows: slice) -> tuple[Array, Error]:
    """Some positions of a tensor, and of how far it may be off."""
    value, error = pair
    return value[rows], error[rows] if isinstance(error, np.ndarray) else error
