"""The programs of speculation: steps in which rows are several positions of one text.

A text's first row is its next position, as in `steps.step`; the rows after it are positions further
on, with drafted tokens. A position's token is chosen from the model's own distribution there, by
the position's own draw, whether it was drafted or not. It counts as long as the tokens drafted
before it are those that were chosen. So texts are those of `steps.step`, sampled ones too, and a
draft decides only how many tokens a step gives. (Leviathan et al., 2023, arXiv:2211.17192, accept a
draft with the probability that makes the law the same. Here the very tokens are the same, since a
draw is a function of seed and position alone.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.sample_tokens import Counts, count
from qwen_jax.engine import steps
from qwen_jax.engine.layout import Layout
from qwen_jax.engine.lookup import NO_DRAFT, lookup
from qwen_jax.engine.rows import Rows, unpacked
from qwen_jax.engine.sampling import Plan
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.steps import Emitted, Extras, Pages, State
from qwen_jax.engine.weights import Weights
from qwen_jax.model.cache import PAGE, Cache

REJECTED = -4
"""In place of a token: the row was drafted, and its text has gone another way."""

History = Int[Array, "slots H"]
"""Of each slot its text's tokens so far, prompt and answer."""


class Drafting(NamedTuple):
    """What a compiled step of speculation contains.

    Attributes:
        most: tokens that are drafted for a text in a step, at most.
        penalised: some row has penalties, which depend on the tokens of the rows before it.
        model: the draft model's spec; without one, tokens are looked up in the text.
    """

    most: int
    penalised: bool = False
    model: Spec | None = None


class DraftModel(NamedTuple):
    """A smaller model of the same vocabulary.

    Attributes:
        weights: its own.
        pages: its keys and values, in pages of the same numbers as the other's.
    """

    weights: Weights
    pages: Pages


class Lanes(NamedTuple):
    """Which rows are positions of the same text.

    Attributes:
        ahead: how far a row's position is ahead of its text's next one. So many rows just before it
            are the text's, too.
        draft: of which draft it has a token, where it is ahead.
        firsts: of each draft, its text's first row; -1 where there is no draft.
    """

    ahead: Int[Array, "R"]
    draft: Int[Array, "R"]
    firsts: Int[Array, " D"]


class _Carry(NamedTuple):
    """What changes from step to step; `state` and `counts` are each row's text's."""

    pages: Pages
    draft_pages: Pages | None
    state: State
    counts: Counts | None
    history: History


@functools.partial(jax.jit, static_argnums=(0, 10, 11, 12), donate_argnums=(2, 4, 5, 6, 8))
def speculate(
    spec: Spec,
    weights: Weights,
    pages: Pages,
    tables: Int[Array, "R n"],
    state: State,
    extras: Extras | None,
    history: History,
    draft_weights: Weights | None,
    draft_pages: Pages | None,
    packed: tuple[Int[Array, "R fields"], Lanes],
    plan: Plan,
    drafting: Drafting,
    times: int,
) -> tuple[Pages, State, Extras | None, History, Pages | None, Emitted]:
    """Some decode steps of some slots, without leaving the device: see `steps.step`.

    Args:
        draft_weights, draft_pages: the draft model's, where `drafting` names one.
        packed: `Rows`, as `pack_rows` makes them, in which those of a text are alike; and which
            these are.

    Returns:
        Of what is emitted, the tokens of a text are those of its rows in the order of steps and
        rows, without `REJECTED` and `NOT_LIVE`.
    """
    rows, lanes = unpacked(packed[0]), packed[1]
    forward = weights.forward(spec, len(rows.slot))
    ahead, there = lanes.ahead, rows.live != 0
    first = jnp.arange(len(ahead)) - ahead
    counts = bias = allowed = None
    if plan.sampled:
        assert extras is not None
        counts, bias, allowed = jax.tree.map(lambda x: x[rows.slot], extras)

    def one(before: _Carry, _: None) -> tuple[_Carry, Emitted]:
        own, counts, draft_pages = before.state, before.counts, before.draft_pages
        running = there & ~own.done
        if drafting.model is None:
            drafts = _looked_up(before, rows, lanes, drafting.most)
        else:
            assert draft_weights is not None and draft_pages is not None
            model = drafting.model, DraftModel(draft_weights, draft_pages), tables
            masks = counts, bias, allowed
            drafts, draft_pages = _proposed(model, before, rows, lanes, masks, plan, spec, drafting)
        drafted = drafts[lanes.draft, jnp.maximum(ahead - 1, 0)]
        token = jnp.where(ahead == 0, own.token, drafted)
        live = running & (token != NO_DRAFT) & (own.generated + ahead < rows.limit)
        token = jnp.maximum(token, 0)
        found, cache = forward(
            token,
            Cache(before.pages, tables),
            rows.start + own.generated + ahead,
            live,
            jnp.where(live, ahead, 0),
        )
        seen = counts
        if drafting.penalised and seen is not None:
            for k in range(1, drafting.most + 1):
                seen = count(seen, token[_at(first, k)], live & (ahead >= k))
        masks = seen, bias, allowed
        asked = rows.settings, found, own.generated + ahead, *masks
        choice = steps.choice_of(spec, plan, *asked)
        chosen, code = jnp.maximum(choice.token, 0), steps.told(choice)
        ends = steps.is_stop(spec, chosen) | (code < 0)
        agrees = (ahead == 0) | ((jnp.roll(chosen, 1) == token) & ~jnp.roll(ends, 1))
        strays = jnp.cumsum(~agrees)
        counted = live & (strays == strays[first])
        taken = jnp.zeros_like(first).at[first].add(counted)[first]
        after = _grown(own, rows, chosen, first, taken, steps.is_stop(spec, chosen))
        if drafting.penalised and counts is not None:
            for k in range(drafting.most + 1):
                counts = count(counts, chosen[_at(first, k)], running & (k < taken))
        place = jnp.where(counted, rows.start + own.generated + ahead + 1, history.shape[1])
        grown = before.history.at[rows.slot, place].set(chosen, mode="drop")
        carry = _Carry(cache.pages, draft_pages, after, counts, grown)
        tells = jnp.where(counted, code, jnp.where(live, REJECTED, steps.NOT_LIVE))
        return carry, Emitted(tells, choice.logprobs)

    start = _Carry(pages, draft_pages, steps.of_rows(rows, state), counts, history)
    after, emitted = lax.scan(one, start, length=times)
    state, extras = steps.into_slots(rows, state, after.state, extras, after.counts)
    return after.pages, state, extras, after.history, after.draft_pages, emitted


def _at(first: Int[Array, "R"], k: int) -> Int[Array, "R"]:
    """The row `k` rows after each text's first; any other where a text has none."""
    return jnp.minimum(first + k, len(first) - 1)


def _grown(
    before: State,
    rows: Rows,
    chosen: Int[Array, "R"],
    first: Int[Array, "R"],
    taken: Int[Array, "R"],
    stops: Bool[Array, "R"],
) -> State:
    """What the rows' texts are after so many of their rows' tokens."""
    last = first + jnp.maximum(taken - 1, 0)
    generated = before.generated + taken
    grew = taken > 0
    done = before.done | (grew & stops[last]) | (generated >= rows.limit)
    return State(jnp.where(grew, chosen[last], before.token), generated, done)


def _looked_up(before: _Carry, rows: Rows, lanes: Lanes, most: int) -> Int[Array, "D most"]:
    """The texts' drafts out of themselves."""
    firsts = jnp.maximum(lanes.firsts, 0)
    length = rows.start + before.state.generated + 1
    return lookup(before.history[rows.slot[firsts]], length[firsts], most)


def _proposed(
    model: tuple[Spec, DraftModel, Int[Array, "R n"]],
    before: _Carry,
    rows: Rows,
    lanes: Lanes,
    masks: tuple[Any, Any, Any],
    plan: Plan,
    spec: Spec,
    drafting: Drafting,
) -> tuple[Int[Array, "D most"], Pages]:
    """What the draft model would choose in the target's place, by the same draws, and its pages.

    It takes in its last proposal as well, so that it has seen all that can be accepted.
    """
    own, (weights, pages), tables = model
    there = lanes.firsts >= 0
    firsts = jnp.maximum(lanes.firsts, 0)
    state, asked = jax.tree.map(lambda x: x[firsts], (before.state, rows.settings))
    counts, bias, allowed = jax.tree.map(lambda x: x[firsts], masks)
    start, limit, tables = rows.start[firsts], rows.limit[firsts], tables[firsts]
    running = there & (rows.live[firsts] != 0) & ~state.done
    forward = weights.forward(own, len(firsts))
    vocab = spec.config.vocab_size

    def one(
        carry: tuple[Int[Array, " D"], Pages], k: Int[Array, ""]
    ) -> tuple[tuple[Int[Array, " D"], Pages], Int[Array, " D"]]:
        token, pages = carry
        generated = state.generated + k
        live = running & (generated < limit)
        logits, cache = forward(token, Cache(pages, tables), start + generated, live)
        # The rows past the vocabulary, of which the two may have more or fewer, are never chosen.
        logits = logits[:, :vocab]
        logits = jnp.pad(logits, ((0, 0), (0, vocab - logits.shape[1])))
        choice = steps.choice_of(spec, plan, asked, logits, generated, counts, bias, allowed)
        token = jnp.maximum(choice.token, 0)
        return (token, cache.pages), token

    (_, pages), tokens = lax.scan(one, (state.token, pages), jnp.arange(drafting.most + 1))
    return tokens[:-1].T, pages


@functools.partial(jax.jit, donate_argnums=0)
def remember(
    history: History,
    state: State,
    packed: Int[Array, "R fields"],
    tokens: Int[Array, "steps R"],
) -> History:
    """With what a call of `steps.step` chose, which left `state`."""
    rows = unpacked(packed)
    chosen = tokens >= 0
    before = state.generated[rows.slot] - chosen.sum(axis=0)
    place = rows.start + before + jnp.cumsum(chosen, axis=0)
    place = jnp.where(chosen, place, history.shape[1])
    return history.at[rows.slot[None], place].set(tokens, mode="drop")


def create_history(layout: Layout) -> History:
    """An empty one: as many tokens of each slot as its text's table reaches."""
    return jnp.zeros((layout.shapes.slots, layout.table_width * PAGE), jnp.int32)


@functools.partial(jax.jit, donate_argnums=0)
def begin(history: History, slot: Int[Array, ""], tokens: Int[Array, " H"]) -> History:
    """With a text's prompt, padded, in a slot."""
    return history.at[slot].set(tokens)
