"""What runs on the device: the functions the engine compiles, and the state between them.

Everything works on rows, each with its own length, budget, sampling state and done flag.
Position is data, not shape: a growing text never recompiles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sample_tokens import count
from qwen_jax.config import ModelConfig
from qwen_jax.engine import sampling
from qwen_jax.engine.sampling import Choice, Counts, Plan, RowParameters
from qwen_jax.engine.weights import PackedWeights
from qwen_jax.model.cache import Cache, KVCache, StackedCache
from qwen_jax.model.decoder import Parameters, Qwen2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The state of B rows between two decode steps.

    Attributes:
        cache: keys and values of the tokens so far, without `token`.
        prompt: tokens of the prompt.
        token: chosen last, and the next to enter the cache.
        generated: tokens chosen so far, `token` included.
        limit: tokens the row may generate; it is done when it has.
        done: the row chose a stop token or reached its limit; its later tokens mean nothing.
        counts: tokens by id, where the sampling plan has penalties.
    """

    cache: Cache
    prompt: Int[Array, "B"]
    token: Int[Array, "B"]
    generated: Int[Array, "B"]
    limit: Int[Array, "B"]
    done: Bool[Array, "B"]
    counts: Counts | None

    @property
    def length(self) -> Int[Array, "B"]:
        """Tokens in the cache."""
        return self.prompt + self.generated - 1


class Emitted(NamedTuple):
    """What one step chose, and for which rows."""

    choice: Choice
    live: Bool[Array, "B"]


def create_cache(
    config: ModelConfig, dtype: jnp.dtype, rows: int, capacity: int, stacked: bool
) -> Cache:
    return (StackedCache if stacked else KVCache).create(config, rows, capacity, dtype)


def make_model(
    config: ModelConfig,
    weights: Parameters | PackedWeights,
    *,
    precision: lax.Precision,
    implementation: str,
) -> Qwen2:
    """The model over traced weights; packed ones are put together inside the program."""
    how: dict[str, Any] = {"precision": precision, "implementation": implementation}
    if isinstance(weights, PackedWeights):
        return Qwen2(config, weights.parameters(), look_up=weights.look_up, **how)
    return Qwen2(config, weights, **how)


ModelMaker = Callable[[Parameters | PackedWeights], Qwen2]
Forward = Callable[..., tuple[jax.Array, Any]]


class Constants(NamedTuple):
    stop_ids: Int[Array, "stops"]
    valid_tokens: int
    unused_ids: tuple[int, ...] = ()
    implementation: str = "auto"


def prefill_chunk(
    make: ModelMaker,
    weights: Parameters | PackedWeights,
    cache: Cache,
    last: Float[Array, "B D"],
    tokens: Int[Array, "B T"],
    start: Int[Array, ""],
    lengths: Int[Array, "B"],
) -> tuple[Cache, Float[Array, "B D"]]:
    """One chunk of every prompt; keeps the hidden state of the rows that end in it."""
    hidden, cache = _run_chunk(make, weights, cache, tokens, start, lengths)
    at = lengths - 1 - start
    ends_here = (at >= 0) & (at < tokens.shape[1])
    at = jnp.clip(at, 0, tokens.shape[1] - 1)
    here = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
    return cache, jnp.where(ends_here[:, None], here, last)


def _run_chunk(
    make: ModelMaker,
    weights: Parameters | PackedWeights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    start: Int[Array, ""],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B T D"], Cache]:
    starts = jnp.full_like(lengths, start)
    # A row that ended in an earlier chunk still has slots to see: those of its own prompt.
    valid = jnp.minimum(lengths, start + tokens.shape[1])
    return make(weights)(tokens, cache, starts, valid)


def chunk_logits(
    make: ModelMaker,
    weights: Parameters | PackedWeights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    start: Int[Array, ""],
    lengths: Int[Array, "B"],
) -> tuple[Cache, Float[Array, "B T V"]]:
    hidden, cache = _run_chunk(make, weights, cache, tokens, start, lengths)
    return cache, make(weights).logits(hidden)


def _choose(
    constants: Constants,
    logits: Float[Array, "B V"],
    params: RowParameters,
    counts: Counts | None,
    generated: Int[Array, "B"],
    live: Bool[Array, "B"],
    plan: Plan,
) -> tuple[Emitted, Counts | None, Bool[Array, "B"]]:
    """Logits to tokens, the counts with live rows' in, and whether each is a stop."""
    if constants.unused_ids:
        holes = jnp.asarray(constants.unused_ids)
        logits = logits.at[:, holes].set(-jnp.inf, mode="drop")
    choice = sampling.choose(
        logits,
        params,
        counts,
        generated,
        plan,
        valid_tokens=constants.valid_tokens,
        implementation=constants.implementation,
    )
    # -1 is no token, and the host ends a run that meets one.
    choice = choice._replace(token=jnp.maximum(choice.token, 0))
    if counts is not None:
        counts = count(counts, choice.token, live)
    stopped = (choice.token[:, None] == constants.stop_ids).any(axis=1)
    return Emitted(choice, live), counts, stopped


def begin(
    make: ModelMaker,
    constants: Constants,
    weights: Parameters | PackedWeights,
    last: Float[Array, "B D"],
    rows: tuple[Int[Array, "B"], Int[Array, "B"], Counts | None],
    params: RowParameters,
    plan: Plan,
) -> tuple[dict[str, jax.Array | Counts | None], Emitted]:
    """The first token of every row; all fields of `Rows` but the cache."""
    lengths, limits, counts = rows
    zero = jnp.zeros_like(lengths)
    logits = make(weights).logits(last[:, None])[:, 0]
    live = limits > 0
    emitted, counts, stopped = _choose(constants, logits, params, counts, zero, live, plan)
    fields = {
        "prompt": lengths,
        "token": emitted.choice.token,
        "generated": zero + 1,
        "limit": limits,
        "done": stopped | (limits <= 1),
        "counts": counts,
    }
    return fields, emitted


def decode_many(
    make: ModelMaker,
    constants: Constants,
    weights: Parameters | PackedWeights,
    rows: Rows,
    params: RowParameters,
    plan: Plan,
    steps: int,
) -> tuple[Rows, Emitted]:
    """Some steps; a stacked cache goes through the decode-step kernel."""
    capacity = rows.cache.capacity
    if isinstance(rows.cache, StackedCache):
        assert isinstance(weights, PackedWeights)
        forward: Forward = functools.partial(forward_packed, weights)
    else:
        forward = functools.partial(_forward, make(weights))

    def step(before: Rows, _: None) -> tuple[Rows, Emitted]:
        live = ~before.done
        # A done row keeps its place: its token goes where no slot is, and is dropped.
        at = jnp.where(live, before.length, capacity)
        logits, cache = forward(before.token, before.cache, at, before.length + live)
        emitted, counts, stopped = _choose(
            constants, logits, params, before.counts, before.generated, live, plan
        )
        generated = before.generated + live
        after = dataclasses.replace(
            before,
            cache=cache,
            token=jnp.where(live, emitted.choice.token, before.token),
            generated=generated,
            done=before.done | stopped | (generated >= before.limit),
            counts=counts,
        )
        return after, emitted

    return lax.scan(step, rows, length=steps)


def _forward(
    model: Qwen2,
    token: Int[Array, "B"],
    cache: Cache,
    at: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], Cache]:
    """One token of every row through the model; its keys and values go to slot `at`."""
    hidden, cache = model(token[:, None], cache, at, lengths)
    return model.logits(hidden)[:, 0], cache


def forward_packed(
    weights: PackedWeights,
    token: Int[Array, "B"],
    cache: StackedCache,
    at: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], StackedCache]:
    """The same through the decode-step kernel.

    A done row, whose `at` is past the cache, goes along as the shortest text, which costs least.
    """
    live = at < cache.capacity
    logits, new = weights.decode(token, cache.layers, jnp.where(live, lengths - 1, 0))
    return logits, cache.write_all(new, at)
