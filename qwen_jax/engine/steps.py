"""The programs: pure functions of a spec, weights, the pool of pages and rows, compiled once each.

Positions, lengths, settings and which rows live are data, not shapes: neither a growing text nor
another mix of requests compiles anything. The pool is donated, and comes back with more in it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.sample_tokens import (
    Choice,
    Counts,
    Logprobs,
    Settings,
    count,
    words,
)
from qwen_jax.engine import sampling
from qwen_jax.engine.rows import Rows, unpacked
from qwen_jax.engine.sampling import Plan
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.weights import Weights
from qwen_jax.model.cache import Cache

Pages = Float[Array, "2L P K C H"]
NOT_LIVE, BANNED, NOT_FINITE = -1, -2, -3
"""In place of a token: the row was done, every token is banned, the logits are not finite."""


class State(NamedTuple):
    """What a device knows of every slot between two calls of `step`.

    Attributes:
        token: chosen last, and the next to enter the cache.
        generated: tokens chosen so far.
        done: the row chose a stop token or reached its limit.
    """

    token: Int[Array, " slots"]
    generated: Int[Array, " slots"]
    done: Bool[Array, " slots"]

    @classmethod
    @functools.partial(jax.jit, static_argnums=(0, 1))  # one program instead of three
    def create(cls, slots: int) -> "State":
        token, generated = (jnp.zeros(slots, jnp.int32) for _ in range(2))
        return cls(token, generated, jnp.ones(slots, bool))


class Extras(NamedTuple):
    """What only some requests ask for: it is there for all slots as soon as one does.

    Attributes:
        counts: the tokens of each text, for penalties.
        bias: added to logits.
        allowed: a bit for every token that may be chosen.
    """

    counts: Counts
    bias: Float[Array, "slots V"]
    allowed: UInt32[Array, "slots words"]

    @classmethod
    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def create(cls, slots: int, vocab: int) -> "Extras":
        seen, allowed = (jnp.zeros((slots, words(vocab)), jnp.uint32) for _ in range(2))
        counts = Counts(seen, jnp.zeros((slots, vocab), jnp.int32))
        return cls(counts, jnp.zeros((slots, vocab), jnp.float32), allowed)


class Emitted(NamedTuple):
    """What a call of `step` chose, step by step.

    Attributes:
        token: or one of the codes above.
        logprobs: where the plan has them.
    """

    token: Int[Array, "steps R"]
    logprobs: Logprobs | None


class Scored(NamedTuple):
    """Of each token of a text that was to come: its log-probability, and the likeliest one's, and
    which that is."""

    logprob: Float[Array, "R T"]
    best: Float[Array, "R T"]
    likeliest: Int[Array, "R T"]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend(
    spec: Spec,
    weights: Weights,
    pages: Pages,
    tables: Int[Array, "R n"],
    tokens: Int[Array, "R T"],
    start: Int[Array, "R"],
    lengths: Int[Array, "R"],
) -> Pages:
    """Puts tokens into the cache, from position `start[r]` of each row on.

    Rows may be pieces of one text at positions that follow each other: a layer's keys are all
    written before any of its queries looks.

    Args:
        lengths: tokens of each row once these are in, padding not counted; 0 for a row that is
            not there.
    """
    return weights.model(spec)(tokens, Cache(pages, tables), start, lengths)[1].pages


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def score(
    spec: Spec,
    weights: Weights,
    pages: Pages,
    tables: Int[Array, "R n"],
    tokens: Int[Array, "R T"],
    start: Int[Array, "R"],
    lengths: Int[Array, "R"],
    targets: Int[Array, "R T"],
) -> tuple[Pages, Scored]:
    """The same, and how likely the model finds `targets[r, t]` after token t."""
    cache, found = all_logits(spec, weights, Cache(pages, tables), tokens, start, lengths)
    chosen = jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0]
    whole = jax.nn.logsumexp(found, axis=-1)
    likeliest = found.argmax(axis=-1).astype(jnp.int32)
    return cache.pages, Scored(chosen - whole, found.max(axis=-1) - whole, likeliest)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def logits(
    spec: Spec,
    weights: Weights,
    pages: Pages,
    tables: Int[Array, "R n"],
    tokens: Int[Array, "R T"],
    start: Int[Array, "R"],
    lengths: Int[Array, "R"],
) -> tuple[Pages, Float[Array, "R T V"]]:
    """The same as `extend`, and the logits after every token."""
    cache, found = all_logits(spec, weights, Cache(pages, tables), tokens, start, lengths)
    return cache.pages, found


def all_logits(
    spec: Spec,
    weights: Weights,
    cache: Cache,
    tokens: Int[Array, "B T"],
    start: Int[Array, "B"],
    lengths: Int[Array, "B"],
) -> tuple[Cache, Float[Array, "B T V"]]:
    """A call of the model, inside a program: the cache, and the logits after every token."""
    model = weights.model(spec)
    hidden, cache = model(tokens, cache, start, lengths)
    return cache, model.logits(hidden)


@functools.partial(jax.jit, static_argnums=(0, 7, 8), donate_argnums=(2, 4, 5))
def step(
    spec: Spec,
    weights: Weights,
    pages: Pages,
    tables: Int[Array, "R n"],
    state: State,
    extras: Extras | None,
    packed: Int[Array, "R fields"],
    plan: Plan,
    steps: int,
) -> tuple[Pages, State, Extras | None, Emitted]:
    """Some decode steps of some slots, without leaving the device.

    The number of steps is fixed, since a loop that ends by a condition on the device would ask
    the host at every one of them.

    Args:
        extras: where the plan is to look at them.
        packed: `Rows`, as `pack_rows` makes them.
    """
    rows = unpacked(packed)
    forward = weights.forward(spec, len(rows.slot))
    there = rows.live != 0
    counts = bias = allowed = None
    if plan.sampled:
        assert extras is not None
        counts, bias, allowed = jax.tree.map(lambda x: x[rows.slot], extras)

    class Carry(NamedTuple):
        pages: Pages
        state: State
        counts: Counts | None

    def one(before: Carry, _: None) -> tuple[Carry, Emitted]:
        live = there & ~before.state.done
        position = rows.start + before.state.generated
        found, cache = forward(before.state.token, Cache(before.pages, tables), position, live)
        masks = before.counts, bias, allowed
        own, counts, emitted = _chosen(spec, plan, rows, found, before.state, *masks)
        return Carry(cache.pages, own, counts), emitted

    start = Carry(pages, of_rows(rows, state), counts)
    after, emitted = lax.scan(one, start, length=steps)
    state, extras = into_slots(rows, state, after.state, extras, after.counts)
    return after.pages, state, extras, emitted


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    spec: Spec,
    weights: Weights,
    pages: Pages,
    tables: Int[Array, "R n"],
    state: State,
    packed: Int[Array, "R fields"],
) -> tuple[Pages, Float[Array, "R V"]]:
    """The first half of one decode step: the logits of some slots' next tokens. `choose` is the
    other; meanwhile the host finds out what may be chosen."""
    rows = unpacked(packed)
    own = of_rows(rows, state)
    live = (rows.live != 0) & ~own.done
    forward = weights.forward(spec, len(rows.slot))
    position = rows.start + own.generated
    logits, cache = forward(own.token, Cache(pages, tables), position, live)
    return cache.pages, logits


@functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnums=(2, 3))
def choose(
    spec: Spec,
    logits: Float[Array, "R V"],
    state: State,
    extras: Extras | None,
    packed: Int[Array, "R fields"],
    allowed: UInt32[Array, "R words"],
    plan: Plan,
    compare: bool,
) -> tuple[State, Extras | None, Emitted]:
    """The second half: one token of each slot, out of those that its row of the mask allows.

    Args:
        extras: where some row has penalties or biases.
        packed: those that `advance` had.
        compare: whether to emit, as if by a second step, what each would have chosen of all.
    """
    rows, counts, bias = unpacked(packed), None, None
    if extras is not None:
        counts, bias = jax.tree.map(lambda x: x[rows.slot], (extras.counts, extras.bias))
    before = of_rows(rows, state)
    had = counts
    own, counts, emitted = _chosen(spec, plan, rows, logits, before, had, bias, allowed)
    state, kept = into_slots(rows, state, own, extras, counts)
    emitted = jax.tree.map(lambda x: x[None], emitted)
    if compare:
        none = jnp.zeros_like(rows.slot)
        free = rows.settings._replace(masked=none, logprobs=none - 1)
        of_all = choice_of(spec, plan, free, logits, before.generated, had, bias, None)
        emitted = emitted._replace(token=jnp.stack([emitted.token[0], of_all.token]))
    return state, kept, emitted


def of_rows(rows: Rows, state: State) -> State:
    """The state of the rows' slots; of fresh rows the host's."""
    fresh = rows.fresh != 0
    return State(
        jnp.where(fresh, rows.token, state.token[rows.slot]),
        jnp.where(fresh, rows.generated, state.generated[rows.slot]),
        jnp.where(fresh, False, state.done[rows.slot]),
    )


def _chosen(
    spec: Spec,
    plan: Plan,
    rows: Rows,
    logits: Float[Array, "R V"],
    before: State,
    counts: Counts | None,
    bias: Float[Array, "R V"] | None,
    allowed: UInt32[Array, "R words"] | None,
) -> tuple[State, Counts | None, Emitted]:
    """One token of each row that lives: what the rows are then, and what the host is told."""
    live = (rows.live != 0) & ~before.done
    choice = choice_of(spec, plan, rows.settings, logits, before.generated, counts, bias, allowed)
    token = jnp.maximum(choice.token, 0)
    counts = counts and count(counts, token, live)
    generated = before.generated + live
    done = before.done | is_stop(spec, token) | (generated >= rows.limit)
    after = State(jnp.where(live, token, before.token), generated, done)
    return after, counts, Emitted(jnp.where(live, told(choice), NOT_LIVE), choice.logprobs)


def choice_of(
    spec: Spec,
    plan: Plan,
    asked: Settings,
    logits: Float[Array, "R V"],
    generated: Int[Array, "R"],
    counts: Counts | None,
    bias: Float[Array, "R V"] | None,
    allowed: UInt32[Array, "R words"] | None,
) -> Choice:
    """One token a row, after so many that the row's text has generated."""
    chosen = functools.partial(sampling.choose, plan=plan, spec=spec)
    given = logits, asked, generated, counts, bias, allowed
    # Each device of a mesh by itself: a kernel can't be dealt out.
    return spec.split.over(chosen, (None,) * len(given), None)(*given)


def is_stop(spec: Spec, token: Int[Array, "R"]) -> Bool[Array, "R"]:
    """Whether a token ends its text."""
    return (token[:, None] == jnp.asarray(spec.stop_ids, jnp.int32)).any(axis=1)


def told(choice: Choice) -> Int[Array, "R"]:
    """What the host is told of a row that lives: its token, or why there is none."""
    token = jnp.maximum(choice.token, 0)
    return jnp.where(choice.finite, jnp.where(choice.banned, BANNED, token), NOT_FINITE)


def into_slots(
    rows: Rows, state: State, own: State, extras: Extras | None, counts: Counts | None
) -> tuple[State, Extras | None]:
    """All slots, with what the rows' have become."""
    state = State(*(old.at[rows.slot].set(new) for old, new in zip(state, own, strict=True)))
    if counts is not None:
        assert extras is not None
        put = jax.tree.map(lambda old, new: old.at[rows.slot].set(new), extras.counts, counts)
        extras = extras._replace(counts=put)
    return state, extras


@functools.partial(jax.jit, donate_argnums=0)
def insert(
    extras: Extras,
    slot: Int[Array, ""],
    seen: UInt32[Array, "words"],
    allowed: UInt32[Array, "words"],
    bias: Float[Array, "V"],
) -> Extras:
    """A text's tokens so far, its mask and its biases into a slot; nothing is generated yet."""
    counts = extras.counts
    return Extras(
        Counts(counts.seen.at[slot].set(seen), counts.generated.at[slot].set(0)),
        extras.bias.at[slot].set(bias),
        extras.allowed.at[slot].set(allowed),
    )
