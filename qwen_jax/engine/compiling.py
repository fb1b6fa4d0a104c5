"""Compiling ahead, while weights load: what is compiled for shapes alone is found by the calls."""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.sample_tokens import words
from qwen_jax.engine import calls
from qwen_jax.engine.drafts import FEW, TRIAL
from qwen_jax.engine.layout import Layout
from qwen_jax.engine.rows import FIELDS
from qwen_jax.engine.sampling import (
    IN_HALVES,
    PLANS,
    Plan,
    Sampling,
    has_penalties,
    looks_at_scores,
)
from qwen_jax.engine.shapes import Shapes, fitting
from qwen_jax.engine.speculate import Drafting, Lanes, create_history
from qwen_jax.engine.steps import Extras, State
from qwen_jax.engine.unmasked import may_be
from qwen_jax.engine.weights import Weights
from qwen_jax.model.cache import HEADS, create_pages
from qwen_jax.model.split import WHOLE

T = TypeVar("T")

PROMPT = 4
"""Pieces of one text's prompt, as a guess."""


class Programs(NamedTuple):
    """Which programs are meant.

    Attributes:
        rows: of `step`.
        pieces: of `extend`, or as many as it can have of a length.
        plans: how `step` chooses tokens.
        halves: rows of `advance` and `choose`, which texts with a constraint need, and whether
            `choose` looks at penalties and biases.
        penalised: whether rows of steps with drafts have penalties.
    """

    rows: Collection[int]
    pieces: Collection[int]
    plans: Collection[Plan]
    halves: Collection[tuple[int, bool]] = ()
    penalised: Collection[bool] = (False, True)

    @classmethod
    def of(cls, shapes: Shapes, constrained: bool) -> "Programs":
        """All that nearly all requests need."""
        scored = {looks_at_scores((), shapes.batch_invariant), True} if constrained else ()
        halves = list(itertools.product(shapes.rows, scored))
        return cls(shapes.rows, shapes.pieces, PLANS, halves)


class Expected(NamedTuple):
    """What an engine will be asked for.

    Attributes:
        texts: how many at the same time, at most.
        choices: how their tokens are chosen, and how many log-probabilities are wanted, or None;
            of those without a constraint.
        constrained: how tokens are chosen of those with one.
    """

    texts: int
    choices: Collection[tuple[Sampling, int | None]]
    constrained: Collection[Sampling] = ()

    def programs(self, layout: Layout) -> Programs:
        """The fewest that serve it."""
        shapes, rows = layout.shapes, [fitting(layout.shapes.rows, self.texts)]
        pieces = [fitting(shapes.pieces, PROMPT) if self.texts == 1 else shapes.pieces[-1]]
        # Those with a constraint may go on like those without.
        let_go = [s for s in self.constrained if layout.unmasked and may_be(s)]
        free = [*self.choices, *((sampling, None) for sampling in let_go)]
        plans = [Plan.of(free, layout.spec.config.vocab_size)] if free else []
        penalised = any(has_penalties(sampling) for sampling, _ in self.choices)
        if not self.constrained:
            return Programs(rows, pieces, plans, penalised=[penalised])
        # Tokens that are known enter in calls of any size.
        scored = looks_at_scores(self.constrained, shapes.batch_invariant)
        return Programs(rows, shapes.pieces, plans, [(rows[0], scored)], [penalised])


def compile_ahead(
    layout: Layout,
    weights: Weights,
    programs: Programs,
    draft: tuple[Layout, Weights] | None = None,
) -> list[Future[object]]:
    """Starts to compile programs, each on a thread of its own.

    Args:
        weights: of arrays, or of shapes alone.
        draft: of a draft model.
    """
    wanted = [*_extends(layout, weights, programs), *_steps(layout, weights, programs)]
    if layout.draft_tokens and programs.rows:
        wanted += _steps_with_drafts(layout, weights, programs, draft)
    if draft is not None:
        wanted += _extends(*draft, programs)
    pool = ThreadPoolExecutor(len(wanted), thread_name_prefix="compile")
    futures: list[Future[object]] = [pool.submit(lower) for lower in wanted]
    pool.shutdown(wait=False)
    return futures


def _shapes_of(layout: Layout, weights: Weights) -> Weights:
    whole = layout.spec.split is WHOLE

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None if whole else x.sharding)

    shapes: Weights = jax.tree.map(shape, weights)
    return shapes


def _made(layout: Layout, make: Callable[[], T], axis: int | None = None) -> T:
    """Shapes of what is made, on a mesh dealt out along an axis, or equal on all devices."""
    sharding = layout.spec.split.sharding(axis)
    shapes: T = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(make)
    )
    return shapes


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _pages(layout: Layout) -> Any:
    spec = layout.spec
    return _made(layout, lambda: create_pages(spec.cached, layout.pages, spec.cache), HEADS)


def _extends(
    layout: Layout, weights: Weights, programs: Programs
) -> Iterator[Callable[[], object]]:
    given, width = _shapes_of(layout, weights), layout.table_width
    for length, count in sorted(layout.shapes.extends(programs.pieces)):
        row, tokens = _ints(count), _ints(count, length)
        args = given, _pages(layout), _ints(count, width), tokens, row, row
        yield functools.partial(calls.extend.prepare, layout.spec.without_tokenizer, *args)


def _steps(layout: Layout, weights: Weights, programs: Programs) -> Iterator[Callable[[], object]]:
    spec, shapes, vocab = layout.spec, layout.shapes, layout.spec.config.vocab_size
    given, width = _shapes_of(layout, weights), layout.table_width
    state = _made(layout, lambda: State.create(shapes.slots))
    extras = _made(layout, lambda: Extras.create(shapes.slots, vocab))
    for plan in programs.plans:
        for count in programs.rows:
            packed = _ints(count, FIELDS)
            args = given, _pages(layout), _ints(count, width), state
            rest = extras if plan.sampled else None, packed, plan, shapes.steps
            yield functools.partial(calls.step.prepare, spec, *args, *rest)
    for count in {count for count, _ in programs.halves}:
        packed = _ints(count, FIELDS)
        held = given, _pages(layout), _ints(count, width)
        yield functools.partial(calls.advance.prepare, spec, *held, state, packed)
    for count, scored in programs.halves:
        packed = _ints(count, FIELDS)
        logits = _made(layout, functools.partial(jnp.zeros, (count, vocab), jnp.float32))
        allowed = jax.ShapeDtypeStruct((count, words(vocab)), jnp.uint32)
        found = logits, state, extras if scored else None, packed, allowed
        how = IN_HALVES, layout.unmasked
        yield functools.partial(calls.choose.prepare, spec, *found, *how)
    sampled = programs.rows and any(plan.sampled for plan in programs.plans)
    if sampled or any(scored for _, scored in programs.halves):
        bits = jax.ShapeDtypeStruct((words(vocab),), jnp.uint32)
        bias = jax.ShapeDtypeStruct((vocab,), jnp.float32)
        yield functools.partial(calls.insert.prepare, extras, _ints(), bits, bits, bias)


def _steps_with_drafts(
    layout: Layout, weights: Weights, programs: Programs, draft: tuple[Layout, Weights] | None
) -> Iterator[Callable[[], object]]:
    spec, shapes, vocab = layout.spec, layout.shapes, layout.spec.config.vocab_size
    given, width = _shapes_of(layout, weights), layout.table_width
    state = _made(layout, lambda: State.create(shapes.slots))
    extras = _made(layout, lambda: Extras.create(shapes.slots, vocab))
    history = _made(layout, lambda: create_history(layout))
    yield functools.partial(calls.begin.prepare, history, _ints(), _ints(history.shape[1]))
    for count in programs.rows:
        chosen = _ints(shapes.steps, count)
        packed = _ints(count, FIELDS)
        yield functools.partial(calls.remember.prepare, history, state, packed, chosen)
    # Those of so many texts, and the next size, where there is room for drafts.
    sizes = [size for size in shapes.rows if size >= min(programs.rows)][: len(programs.rows) + 1]
    theirs = (None, None) if draft is None else (_shapes_of(*draft), _pages(draft[0]))
    own = None if draft is None else draft[0].spec.without_tokenizer
    # A draft model is tried a few steps at a time, with few tokens.
    most = layout.draft_tokens
    times = [(shapes.steps, most)] + ([] if draft is None else [(TRIAL, min(FEW, most))])
    for size, plan, penalised, (count, tokens) in itertools.product(
        sizes, programs.plans, programs.penalised, times
    ):
        if size == 1 or (penalised and not plan.sampled):
            continue
        room = size if draft is None else fitting(shapes.rows, min(programs.rows))
        lanes = Lanes._make([_ints(size), _ints(size), _ints(room)])
        rows = _ints(size, FIELDS), lanes
        args = given, _pages(layout), _ints(size, width), state
        rest = extras if plan.sampled else None, history, *theirs, rows, plan
        drafting = Drafting(tokens, penalised, own)
        yield functools.partial(calls.speculate.prepare, spec, *args, *rest, drafting, count)
