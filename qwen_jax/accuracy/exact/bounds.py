"""How far a correct engine may be from float64: an elementwise bound for each operation.

A reduction of n products p_i that adds up to y rounds each product and each partial sum s_k: its
error is sum(d_i p_i) + sum(e_k s_k) with |d|, |e| <= u. The guaranteed bound is gamma_n sum|p_i|,
gamma_n = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section
3.1). It grows with n where real errors grow with sqrt(n), so it hides TF32 behind float32 from
some 300 terms on. Taken as independent and of mean zero (Higham and Mary, 2019, A New Approach
to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41), the roundings obey Hoeffding's
inequality: the error passes L u sqrt(sum p_i^2 + sum s_k^2) with probability 2 exp(-L^2 / 2) at
most. An engine's order of summation is unknown; over all orders the mean of sum s_k^2 is
n (y^2 / 3 + sum p_i^2 / 6), to within 1/n. With L = 8 the probability is 2.5e-14 an element.

Errors of inputs, where a span of operations is replayed at once, are propagated to first order
and as independent ones, the root of the sum of squares; so are all other sums of many roundings.
Elementwise steps count each rounding in full, and every step as if it were rounded to the
activations' dtype, and each operand once more: compilers may keep wider values between
operations than those that are recorded.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from qwen_jax.accuracy.exact import operations
from qwen_jax.accuracy.exact.operands import squared_error
from qwen_jax.accuracy.exact.operations import Context
from qwen_jax.accuracy.exact.pieces import Error, Piece, in_pieces
from qwen_jax.accuracy.exact.rounding import SMALLEST, UNIT, round_interval
from qwen_jax.accuracy.traces.trace import Header
from qwen_jax.config import ModelConfig

Array = np.ndarray
L = 8.0
"""Of Hoeffding's inequality; see above."""

U32 = UNIT["float32"]


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Unit roundoffs of an engine. Sums are float32 everywhere, and so are scores, unless an
    engine's are of a narrower dtype by their own account, as transformers' eager ones.

    Attributes:
        storage: of activations.
        operand: to which a projection's activations and weights are rounded (0: they are not).
        cache: of keys, values and probabilities in attention.
        scores: of attention's scores.
        least: below this part of a row's largest value, float16 operands lose digits.
        float16: whether activations are float16, with its narrow range.
        operands: of some projections, by their tensors' full names, what the activation is
            rounded to for that product alone: one of `operands.KINDS`.
        input: that of the projection at hand.
    """

    storage: float = U32
    operand: float = 0.0
    cache: float = U32
    scores: float = U32
    least: float = 0.0
    float16: bool = False
    operands: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    input: str | None = None

    @classmethod
    def of(cls, header: Header) -> "Arithmetic":
        """What a trace says of its engine."""
        storage, weights = UNIT[header.activation_dtype], UNIT[header.dtype]
        operand = weights if weights > storage else 0.0
        if header.matmul_precision != "highest" and "cpu" not in header.device.lower():
            operand = max(operand, UNIT["tf32"])
        least = 2.0**-24 if header.dtype == "float16" else 0.0
        cache = UNIT[header.cache_dtype or header.activation_dtype]
        scores = max(UNIT[header.scores_dtype or "float32"], U32)
        return cls(
            storage,
            operand,
            max(cache, operand),
            scores,
            least=least,
            float16=header.activation_dtype == "float16",
            operands=header.operands,
        )

    def at(self, name: str) -> "Arithmetic":
        """That of one tensor, by its full name."""
        return dataclasses.replace(self, input=self.operands.get(name)) if self.operands else self

    def recorded(self, operation: str, dtype: np.dtype) -> "Arithmetic":
        """With what the dtype of an operation's recorded tensor says besides."""
        if operation != "attn_scores":
            return self
        return dataclasses.replace(self, scores=max(UNIT[dtype.name], self.scores))

    def unit(self, operation: str) -> float:
        """To which an operation's result is rounded."""
        return self.scores if operation == "attn_scores" else self.storage


Bound = Callable[[Piece, Arithmetic, Array], Array]
"""Of a piece of an operation, an engine's arithmetic and the piece's result."""


def reduction(y: Array, squares: Array, n: int) -> Array:
    """Of a float32 sum of n products with the sum of their squares, as derived above."""
    out = y * y  # in place from here on: attention's arrays are large, and new memory is slow
    out *= n / 3
    out += (n / 6 + 1) * squares
    np.sqrt(out, out=out)
    out *= L * U32
    return out


def _lookup(p: Piece, a: Arithmetic, y: Array) -> Array:
    """A factor is itself rounded, and so is the product."""
    return a.storage * np.abs(y) * (1 if p.ctx.knobs.embed_scale == 1 else 3)


def _norm(p: Piece, a: Arithmetic, y: Array) -> Array:
    """The mean of n squares is off by L u sqrt(n / 3), its root by half of that."""
    (x,), (error,), ctx = p.values, p.errors, p.ctx
    n = x.shape[-1]
    if ctx.knobs.identity:
        return a.storage * np.abs(x) + error
    own = np.abs(y) * (L * U32 * (n / 3) ** 0.5 / 2 + 8 * U32 + 4 * a.storage)
    scale = operations.norm_scale(ctx, x)
    if ctx.knobs.statistics:  # a float32 mean may fall on the other side of a rounding
        off = 8 * U32 + L * U32 * (n / 3) ** 0.5 / 2
        low, high = (operations.norm_scale(ctx, x * (1 + s)) for s in (off, -off))
        own = own + np.abs(x * p.params[0]) * (high - low)
    if ctx.knobs.centered:
        own = own + 2 * a.storage * np.abs(p.params[0]) * scale * np.abs(x).max(-1, keepdims=True)
    if np.ndim(error) == 0:
        return own
    direct = np.abs(p.params[0]) * scale * error
    through = np.abs(y) * scale**2 * np.sqrt(((x * error) ** 2).sum(-1, keepdims=True)) / n
    return own + np.hypot(direct, through)


def _linear(p: Piece, a: Arithmetic, y: Array) -> Array:
    """Product and bias are two roundings of what is stored."""
    x, flat = p.values[0], y.reshape(len(y), -1)
    powers, *of_errors = p.squares
    squared = np.square(p.params[0])
    of_products, size = powers @ squared.T, np.abs(flat)
    bias = np.abs(p.params[1] * p.ctx.knobs.bias) if len(p.params) > 1 else 0.0
    product = size + bias
    own = reduction(product, of_products, x.shape[-1])
    # Operands: their own rounding, and the one a fused engine leaves out.
    twice = 2 * a.operand**2 + (a.storage**2 if a.storage > U32 else 0.0)
    own += L * np.sqrt(twice * of_products)
    own += a.storage * (product + size) + U32 * bias
    if a.input:
        own += L * np.sqrt(squared_error(a.input, x, squared))
    if a.least:
        row = np.abs(x).max(-1, keepdims=True)
        own += L * a.least * row * np.sqrt(squared.sum(-1))
    if of_errors:
        own += np.sqrt(of_errors[0].reshape(x.shape) @ squared.T)
    if len(of_errors) > 1:  # to one number or the next: roundings, independent and to either side
        own += L * np.sqrt(of_errors[1].reshape(x.shape) @ squared.T)
    return own.reshape(y.shape)


def angle_units(config: ModelConfig, half: int) -> Float[np.ndarray, "R2"]:
    """How far float32 angles of so many pairs may be from each other, as a part of themselves, in
    unit roundoffs.

    Engines make the frequency theta^(-i / R2) of pair i in three ways. By a power: what the power
    is off by. As exp(-(i / R2) log theta): log theta and the product are rounded, and each of the
    two roundings counts i / R2 log theta times. Pair after pair, as llama.cpp does: i roundings,
    and i times those of the factor, of which a good power leaves two. A power or exponential is off
    by 4 ulps at most (CUDA's powf), 8 units. Then there are a reciprocal, the product with the
    position, the reduction to one turn (a multiple of 2 pi is rounded, and subtracted), and our own
    frequency and product. The first pair's frequency is 1 in each of these ways, and its angle the
    position: only the reduction is left. A scaled frequency (linear, YaRN) is a weighted sum of two
    quotients besides.
    """
    pair = np.arange(half)
    made = np.maximum(2 * pair / half * np.log(config.rope_theta), 3 * pair)
    power, reciprocal_and_product, reduction, ours, scaling = 8, 2, 2, 2, 8
    units = np.where(pair > 0, made + power + reciprocal_and_product + ours, 0) + reduction
    plain = config.yarn is None and config.linear_factor == 1
    return units if plain else units + scaling


def _rope(p: Piece, a: Arithmetic, y: Array) -> Array:
    """cos, sin, each product and the sum are rounded; the angle is off by `angle_units`."""
    (x,), (error,), ctx = p.values, p.errors, p.ctx
    cos, sin = (np.abs(v) for v in operations.rotation(ctx, x))
    angle = np.abs(operations.angles(ctx).astype(np.float64))
    angle *= angle_units(ctx.config, angle.shape[-1])
    first, second, rest = (np.abs(v) for v in operations.pairs(ctx, x, cos.shape[-1]))

    def member(one: Array, other: Array) -> Array:
        own = (one * cos + other * sin) * (3 * a.storage + 2 * U32)
        own = own + (one + other) * 2 * U32
        return own + (one * sin + other * cos) * U32 * angle

    own = operations.unpair(ctx, (member(first, second), member(second, first)), 0 * rest)
    own = own + a.storage * np.abs(y)
    if np.ndim(error) == 0:
        return own
    one, other, left = operations.pairs(ctx, np.asarray(error), cos.shape[-1])
    turned = (np.hypot(one * cos, other * sin), np.hypot(other * cos, one * sin))
    return own + operations.unpair(ctx, turned, left)


def _scores(p: Piece, a: Arithmetic, y: Array) -> Array:
    """Keys, and queries beside them, are rounded. Of narrow scores the product, the scale and what
    comes of both are rounded to their dtype. A number for -inf has its own rounding and that of a
    score, whose product is at most sqrt(n sum p_i^2)."""
    (q, k), errors, ctx = p.values, p.errors, p.ctx
    keys = operations.heads(ctx, k)
    scale, n = abs(ctx.knobs.scale(ctx.config)), q.shape[-1]
    powers, squared = (q * q).swapaxes(0, 1), (keys * keys).swapaxes(1, 2)
    squares = (powers @ squared).swapaxes(0, 1)
    through: Array | float = 0.0
    if any(np.ndim(e) for e in errors):
        eq, ek = (np.broadcast_to(e, v.shape) ** 2 for e, v in zip(errors, p.values, strict=True))
        of_keys = powers @ operations.heads(ctx, ek).swapaxes(1, 2)
        through = (eq.swapaxes(0, 1) @ squared + of_keys).swapaxes(0, 1)
    cache = a.cache if a.cache > a.storage else 0.0
    finite = np.isfinite(y)
    product = np.where(finite, y, 0) / (scale or 1)
    hidden = finite & ~operations.seen(ctx, k)
    if hidden.any():
        product = np.where(hidden, np.sqrt(n * squares), product)
    own = reduction(product, squares, n)
    if cache or a.operand:
        own += L * np.sqrt((cache**2 + a.operand**2) * squares)
    own += np.sqrt(through)
    if ctx.knobs.product:
        own = round_interval(operations.products(ctx, p.values), own, ctx.knobs.product)[1]
    own = scale * (own + 3 * a.scores * np.abs(product))
    return np.where(finite, np.where(hidden, own + a.scores * np.abs(y), own), 0)


def _softmax(p: Piece, a: Arithmetic, y: Array) -> Array:
    """exp(s - m) is off by u |s - m|, the sum by L u sqrt(n); an error e of s makes it e p."""
    (s,), (error,), ctx = p.values, p.errors, p.ctx
    top = s.max(-1, keepdims=True)
    below = np.where(np.isfinite(s), top - s, 0)
    if ctx.knobs.sink is not None:
        below += np.abs(ctx.knobs.sink - top)
    own = y * (U32 * (below + 8 + L * s.shape[-1] ** 0.5) + a.storage)
    if np.ndim(error) == 0:
        return own
    all_of_them = np.sqrt(((y * error) ** 2).sum(-1, keepdims=True))
    return own + np.minimum(y * np.hypot(error, all_of_them), 1)


def _mix(p: Piece, a: Arithmetic, y: Array) -> Array:
    """Probabilities and values enter in the cache's dtype, which the result may have as well."""
    (probs, v), errors, ctx = p.values, p.errors, p.ctx
    values = operations.heads(ctx, v)

    def summed(weights: Array, squares: Array) -> Array:
        """sum over slots, in attn_out's own order."""
        out = (weights.swapaxes(0, 1) @ squares).swapaxes(0, 1)
        return (out.swapaxes(1, 2) if ctx.knobs.dims_first else out).reshape(y.shape)

    squares = summed(probs * probs, values * values)
    own = reduction(y, squares, probs.shape[-1])
    own += L * np.sqrt(3 * a.cache**2 * squares) + (2 * a.storage + 2 * U32) * np.abs(y)
    if a.cache > a.storage:
        own += a.cache * np.abs(y)
    if any(np.ndim(e) for e in errors):
        ep, ev = (np.broadcast_to(e, x.shape) ** 2 for e, x in zip(errors, p.values, strict=True))
        own += np.sqrt(
            summed(ep, values * values) + summed(probs * probs, operations.heads(ctx, ev))
        )
    return own


def _add(p: Piece, a: Arithmetic, y: Array) -> Array:
    """A multiplication before it may be fused with it, and so not be rounded."""
    wider = sum(np.abs(x) for x in p.values)
    return a.storage * (np.abs(y) + wider) + np.hypot(*map(np.asarray, p.errors))


def _gated(p: Piece, a: Arithmetic, y: Array) -> Array:
    """|silu'| <= 1.1; the logistic function may be off by some absolute units."""
    y, gate, up = (np.abs(x) for x in (y, *p.values))
    own = y * (4 * a.storage + 4 * U32) + gate * up * (1.1 * a.storage + 4 * U32)
    if any(np.ndim(e) for e in p.errors):
        other = y / np.where(up > 0, up, 1)
        own += np.hypot(1.1 * up * p.errors[0], other * p.errors[1])
    return own


_BOUNDS: dict[Callable[..., Array], Bound] = {
    operations.lookup: _lookup,
    operations.norm: _norm,
    operations.project: _linear,
    operations.linear: _linear,
    operations.rope: _rope,
    operations.scores: _scores,
    operations.softmax: _softmax,
    operations.mix: _mix,
    operations.add: _add,
    operations.gated: _gated,
}

LEAST = 2.0**-124
"""What float32 and bfloat16 may flush to zero on the way, and twice over."""

SECOND_ORDER = 1.01
"""Products of two roundings, which the first-order terms above leave out."""


def bound(
    name: str,
    ctx: Context,
    arithmetic: Arithmetic,
    value: Float[np.ndarray, "..."],
    inputs: Sequence[Float[np.ndarray, "..."]],
    errors: Sequence[Error],
    params: Sequence[Float[np.ndarray, "..."]],
) -> Float[np.ndarray, "..."]:
    """The bound of operation `name` at `value`, its float64 result.

    Args:
        errors: of each input; 0 where it is what the engine really had.
    """
    whole = Piece(ctx, list(zip(inputs, errors, strict=True)), params)
    return _bound(name, arithmetic, value, whole.with_squares(name, arithmetic.storage))


def _bound(name: str, arithmetic: Arithmetic, value: Array, piece: Piece) -> Array:
    function = _BOUNDS[operations.OPERATIONS[name].compute]
    least = SMALLEST if arithmetic.float16 else LEAST
    with np.errstate(all="ignore"):
        return SECOND_ORDER * function(piece, arithmetic, value) + least


def bounded(
    name: str,
    ctx: Context,
    arithmetic: Arithmetic,
    inputs: Sequence[tuple[Float[np.ndarray, "..."], Error]],
    params: Sequence[Float[np.ndarray, "..."]],
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Operation `name` of inputs that may be off by so much, and its bound."""

    def both(piece: Piece) -> tuple[Array, Array]:
        value = piece.value(name)
        return value, _bound(name, arithmetic, value, piece)

    whole = Piece(ctx, inputs, params).with_squares(name, arithmetic.storage)
    value, limit = in_pieces(both, name, whole)
    return value, limit
