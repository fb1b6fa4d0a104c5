"""The forward pass as a table of operations, each a pure function of its inputs and some knobs.

An operation makes one canonical tensor of one text, position first (see `trace.AXES`). The same
functions run in NumPy float64, where they are the truth, and in jax.numpy, where a fault is
planted in our engine: a fault is a change of `Knobs` or of parameters.

Shape letters as in `trace.AXES`; besides, R2 is the number of rotated pairs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from qwen_jax.accuracy.exact.rounding import round_to
from qwen_jax.config import ModelConfig
from qwen_jax.model.rotary import inverse_frequencies

Array = Any
"""A NumPy or a JAX array."""


@dataclasses.dataclass(frozen=True)
class Calls:
    """Where each of T positions stands: itself, and the call of the engine that it came in.

    Attributes:
        position: of the token in the text.
        start: the first position of its call.
        stop: the one after the call's last.
    """

    position: Int[Array, "T"]
    start: Int[Array, "T"]
    stop: Int[Array, "T"]

    @classmethod
    def of(cls, chunks: Sequence[int]) -> "Calls":
        lengths = np.asarray(chunks)
        stops = np.cumsum(lengths)
        return cls(
            np.arange(stops[-1]), np.repeat(stops - lengths, lengths), np.repeat(stops, lengths)
        )

    @property
    def decode(self) -> Array:
        """Whether a position came alone, after others."""
        return (self.stop - self.start == 1) & (self.start > 0)

    def __getitem__(self, index: slice) -> "Calls":
        return Calls(self.position[index], self.start[index], self.stop[index])


@dataclasses.dataclass(frozen=True)
class Knobs:
    """Everything about an operation that a fault may turn; as they stand, nothing is wrong.

    Attributes:
        embed_scale: factor of the embedding.
        eps: of the norms; None for the model's.
        centered: subtract the mean first, as LayerNorm does.
        identity: the norm does nothing.
        statistics: dtype the norm's scale is rounded to.
        left_out: the share of a row, at its end, whose squares the norm doesn't sum.
        bias: factor of a projection's bias.
        frequencies: radians per position of each pair.
        interleaved: dimensions 2i and 2i + 1 are a pair, not i and i + R2.
        direction: of the rotation.
        position: what the rotation takes for the position.
        phase: dtype that position, frequency and angle are rounded to.
        attention_factor: of cos and sin; None for the model's.
        scale: of the scores.
        product: dtype that scores are rounded to before they are scaled.
        kv_head: the key/value head of each of N query heads.
        visible: which slots each query sees, [T, S].
        hidden: what a place that a query must not see holds, from its scaled score.
        held: the position whose key and value each slot holds, -1 for an empty one, [S]; None
            where every slot holds its own.
        sink: a score that takes part in the softmax, of a value that is zero; None for none.
        dims_first: heads are the inner axis of attn_out.
        activation: of the gate.
        swapped: gate and up change places.
        residual: factor of what an operation adds to.
        operand: dtype both operands of a matrix product are rounded to.
        output: dtype the result is rounded to.
    """

    embed_scale: float = 1.0
    eps: float | None = None
    centered: bool = False
    identity: bool = False
    statistics: str | None = None
    left_out: float = 0.0
    bias: float = 1.0
    frequencies: Callable[[ModelConfig], np.ndarray] = inverse_frequencies
    interleaved: bool = False
    direction: int = 1
    position: Callable[[Calls], Array] = lambda calls: calls.position
    phase: str | None = None
    attention_factor: float | None = None
    scale: Callable[[ModelConfig], float] = lambda config: config.head_dim**-0.5
    product: str | None = None
    kv_head: Callable[[ModelConfig], np.ndarray] = lambda config: (
        np.arange(config.num_heads) // config.group_size
    )
    visible: Callable[[Calls, Array], Array] = lambda calls, slot: slot <= calls.position[:, None]
    hidden: Callable[[Array], Array | float] = lambda score: -np.inf
    held: Callable[[Calls], Array] | None = None
    sink: float | None = None
    dims_first: bool = False
    activation: Callable[[Any, Array], Array] = lambda xp, x: x / (1 + xp.exp(-x))
    swapped: bool = False
    residual: float = 1.0
    operand: str | None = None
    output: str | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What an operation knows besides its inputs.

    Attributes:
        calls: of the positions computed; they see keys from position 0 on.
        tokens: the ids at those positions.
        xp: numpy or jax.numpy.
    """

    config: ModelConfig
    calls: Calls
    tokens: Int[Array, "T"]
    knobs: Knobs = Knobs()
    xp: Any = np

    def turned(self, **knobs: Any) -> "Context":
        return dataclasses.replace(self, knobs=dataclasses.replace(self.knobs, **knobs))


Inputs = Sequence[Array]
Compute = Callable[[Context, Inputs, Sequence[Array]], Array]


def lookup(ctx: Context, inputs: Inputs, params: Sequence[Array]) -> Float[Array, "T D"]:
    return params[0][ctx.tokens] * ctx.knobs.embed_scale


def norm(ctx: Context, inputs: Inputs, params: Sequence[Array]) -> Float[Array, "T D"]:
    """RMSNorm (Zhang and Sennrich, 2019)."""
    (x,), knobs = inputs, ctx.knobs
    if knobs.identity:
        return x
    if knobs.centered:
        x = x - x.mean(axis=-1, keepdims=True)
    return x * norm_scale(ctx, x) * params[0]


def norm_scale(ctx: Context, x: Float[Array, "T D"]) -> Float[Array, "T 1"]:
    eps = ctx.config.rms_eps if ctx.knobs.eps is None else ctx.knobs.eps
    width = x.shape[-1]
    summed = x[..., : width - math.ceil(ctx.knobs.left_out * width)]
    mean = (summed * summed).sum(axis=-1, keepdims=True) / width
    mean = round_to(mean, ctx.knobs.statistics, ctx.xp)
    return round_to(1 / ctx.xp.sqrt(mean + eps), ctx.knobs.statistics, ctx.xp)


def linear(ctx: Context, inputs: Inputs, params: Sequence[Array]) -> Array:
    x, weight = (round_to(a, ctx.knobs.operand, ctx.xp) for a in (inputs[0], params[0]))
    y = x @ weight.T
    return y + params[1] * ctx.knobs.bias if len(params) > 1 else y


def project(ctx: Context, inputs: Inputs, params: Sequence[Array]) -> Float[Array, "T heads H"]:
    return linear(ctx, inputs, params).reshape(len(inputs[0]), -1, ctx.config.head_dim)


def angles(ctx: Context) -> Float[Array, "T 1 R2"]:
    """Radians, rounded to float32 as models are trained with, whatever `xp` computes in."""
    knobs, xp = ctx.knobs, ctx.xp
    position = xp.asarray(knobs.position(ctx.calls)).astype(np.float32)[:, None, None]
    frequency = xp.asarray(knobs.frequencies(ctx.config)).astype(np.float32)
    position, frequency = (round_to(a, knobs.phase, xp) for a in (position, frequency))
    return round_to(position * frequency, knobs.phase, xp) * knobs.direction


def rotation(ctx: Context, like: Array) -> tuple[Float[Array, "T 1 R2"], Float[Array, "T 1 R2"]]:
    """cos and sin, in the dtype of `like`."""
    factor = ctx.knobs.attention_factor
    if factor is None:
        factor = ctx.config.attention_factor
    phase = angles(ctx).astype(like.dtype)
    return ctx.xp.cos(phase) * factor, ctx.xp.sin(phase) * factor


def rope(ctx: Context, inputs: Inputs, params: Sequence[Array]) -> Float[Array, "T heads H"]:
    """Rotary embedding (Su et al., 2021, arXiv:2104.09864)."""
    (x,) = inputs
    cos, sin = rotation(ctx, x)
    first, second, rest = pairs(ctx, x, cos.shape[-1])
    turned = (first * cos - second * sin, second * cos + first * sin)
    return unpair(ctx, turned, rest)


def pairs(ctx: Context, x: Array, half: int) -> tuple[Array, Array, Array]:
    """The two members of each pair, and the dimensions that are not rotated."""
    if ctx.knobs.interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]
    return x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]


def unpair(ctx: Context, members: tuple[Array, Array], rest: Array) -> Array:
    xp = ctx.xp
    if ctx.knobs.interleaved:
        both = xp.stack(members, axis=-1)
        return xp.concatenate([both.reshape(*both.shape[:-2], -1), rest], axis=-1)
    return xp.concatenate([*members, rest], axis=-1)


def heads(ctx: Context, x: Float[Array, "S K H"]) -> Float[Array, "N S H"]:
    """Keys or values as the slots hold them, for each query head."""
    if ctx.knobs.held is not None:
        slot = ctx.knobs.held(ctx.calls)
        x = ctx.xp.where(slot[:, None, None] >= 0, x[slot], 0)
    return x[:, ctx.knobs.kv_head(ctx.config)].swapaxes(0, 1)


def scores(ctx: Context, inputs: Inputs, params: Sequence[Array]) -> Float[Array, "T N S"]:
    scaled = round_to(products(ctx, inputs), ctx.knobs.product, ctx.xp)
    scaled = scaled * ctx.knobs.scale(ctx.config)
    return ctx.xp.where(seen(ctx, inputs[1]), scaled, ctx.knobs.hidden(scaled))


def products(ctx: Context, inputs: Inputs) -> Float[Array, "T N S"]:
    """Of queries and keys, before any scale."""
    q, k = inputs
    return (q.swapaxes(0, 1) @ heads(ctx, k).swapaxes(1, 2)).swapaxes(0, 1)


def seen(ctx: Context, k: Float[Array, "S K H"]) -> Bool[Array, "T 1 S"]:
    """Which keys each query may look at."""
    return ctx.knobs.visible(ctx.calls, ctx.xp.arange(len(k)))[:, None]


def softmax(ctx: Context, inputs: Inputs, params: Sequence[Array]) -> Float[Array, "T N S"]:
    (x,), xp, sink = inputs, ctx.xp, ctx.knobs.sink
    top = x.max(axis=-1, keepdims=True)
    weights = xp.exp(x - top)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / (total if sink is None else total + xp.exp(sink - top))


def mix(ctx: Context, inputs: Inputs, params: Sequence[Array]) -> Float[Array, "T NH"]:
    probs, v = inputs
    out = (probs.swapaxes(0, 1) @ heads(ctx, v)).swapaxes(0, 1)
    return (out.swapaxes(1, 2) if ctx.knobs.dims_first else out).reshape(len(probs), -1)


def add(ctx: Context, inputs: Inputs, params: Sequence[Array]) -> Float[Array, "T D"]:
    return inputs[0] * ctx.knobs.residual + inputs[1]


def gated(ctx: Context, inputs: Inputs, params: Sequence[Array]) -> Float[Array, "T F"]:
    """silu(gate) * up (Shazeer, 2020)."""
    gate, up = reversed(inputs) if ctx.knobs.swapped else inputs
    return ctx.knobs.activation(ctx.xp, gate) * up


@dataclasses.dataclass(frozen=True)
class Operation:
    """How a tensor is made; `inputs` are tensors of the same layer, "stream" what enters it."""

    name: str
    inputs: tuple[str, ...]
    compute: Compute

    def __call__(self, ctx: Context, inputs: Inputs, params: Sequence[Array] = ()) -> Array:
        # Infinities and NaN of a broken candidate are data here.
        with np.errstate(all="ignore"):
            return round_to(self.compute(ctx, inputs, params), ctx.knobs.output, ctx.xp)


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("embed", (), lookup),
        Operation("attn_norm", ("stream",), norm),
        Operation("q_proj", ("attn_norm",), project),
        Operation("k_proj", ("attn_norm",), project),
        Operation("v_proj", ("attn_norm",), project),
        Operation("q_rope", ("q_proj",), rope),
        Operation("k_rope", ("k_proj",), rope),
        Operation("attn_scores", ("q_rope", "k_rope"), scores),
        Operation("attn_probs", ("attn_scores",), softmax),
        Operation("attn_out", ("attn_probs", "v_proj"), mix),
        Operation("o_proj", ("attn_out",), linear),
        Operation("attn_residual", ("stream", "o_proj"), add),
        Operation("ffn_norm", ("attn_residual",), norm),
        Operation("gate_proj", ("ffn_norm",), linear),
        Operation("up_proj", ("ffn_norm",), linear),
        Operation("ffn_act", ("gate_proj", "up_proj"), gated),
        Operation("down_proj", ("ffn_act",), linear),
        Operation("ffn_residual", ("attn_residual", "down_proj"), add),
        Operation("final_norm", ("stream",), norm),
        Operation("logits", ("final_norm",), linear),
    )
}
"""Every operation by its tensor's name, in the order of computation."""

NORMS = ("attn_norm", "ffn_norm", "final_norm")
INNER = tuple(n for n in OPERATIONS if n not in ("embed", "final_norm", "logits"))


def full_name(operation: str, layer: int | None) -> str:
    return operation if layer is None else f"layers.{layer}.{operation}"


def input_names(operation: str, layer: int | None, config: ModelConfig) -> tuple[str, ...]:
    """Full names of the tensors an operation of a layer reads."""

    def resolve(name: str) -> str:
        if name != "stream":
            return full_name(name, layer)
        before = config.num_layers - 1 if layer is None else layer - 1
        return "embed" if before < 0 else full_name("ffn_residual", before)

    return tuple(resolve(name) for name in OPERATIONS[operation].inputs)


def schedule(config: ModelConfig) -> list[tuple[int | None, str]]:
    """Every (layer, operation), in the order of computation."""
    layers = [(i, name) for i in range(config.num_layers) for name in INNER]
    return [(None, "embed"), *layers, (None, "final_norm"), (None, "logits")]
