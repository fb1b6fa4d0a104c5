"""Compiling ahead, while weights load: what is compiled for shapes alone is found by the calls."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.sample_tokens import words
from qwen_jax.engine import steps
from qwen_jax.engine.sampling import Plan
from qwen_jax.engine.shapes import Shapes
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.steps import Extras, State
from qwen_jax.engine.weights import Weights
from qwen_jax.model.cache import create_pages, pages_for


class Layout(NamedTuple):
    """All that decides the shapes of an engine's programs, besides its weights.

    Attributes:
        spec, shapes: the engine's.
        pages: of a layer, the one of nobody among them.
    """

    spec: Spec
    shapes: Shapes
    pages: int

    @property
    def table_width(self) -> int:
        """Pages of a text as long as the context, or as the pool where that is shorter."""
        return min(pages_for(self.spec.config.context_length), self.pages - 1)


def compile_ahead(
    layout: Layout,
    weights: Weights,
    rows: Sequence[int],
    plans: Sequence[Plan],
) -> list[Future[object]]:
    """Starts to compile, each on a thread of its own, what texts need.

    Args:
        weights: of arrays, or of shapes alone.
        rows: how many are to run together.
        plans: how they choose tokens.
    """
    wanted = [*_extends(layout, weights), *_steps(layout, weights, rows, plans)]
    pool = ThreadPoolExecutor(len(wanted), thread_name_prefix="compile")
    futures: list[Future[object]] = [pool.submit(lower) for lower in wanted]
    pool.shutdown(wait=False)
    return futures


def _compile(program: Any, *args: Any) -> object:
    return program.lower(*args).compile()


def _shapes_of(weights: Weights) -> Weights:
    shapes: Weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights)
    return shapes


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _pages(layout: Layout) -> jax.ShapeDtypeStruct:
    spec = layout.spec
    return jax.eval_shape(lambda: create_pages(spec.config, layout.pages, spec.cache))


def _extends(layout: Layout, weights: Weights) -> Iterator[Callable[[], object]]:
    given, width = _shapes_of(weights), layout.table_width
    for count in layout.shapes.pieces:
        for length in layout.shapes.lengths:
            row, tokens = _ints(count), _ints(count, length)
            args = given, _pages(layout), _ints(count, width), tokens, row, row
            yield functools.partial(_compile, steps.extend, layout.spec, *args)


def _steps(
    layout: Layout, weights: Weights, rows: Sequence[int], plans: Sequence[Plan]
) -> Iterator[Callable[[], object]]:
    spec, shapes, vocab = layout.spec, layout.shapes, layout.spec.config.vocab_size
    given, width = _shapes_of(weights), layout.table_width
    state = jax.eval_shape(lambda: State.create(shapes.slots))
    extras = jax.eval_shape(lambda: Extras.create(shapes.slots, vocab))
    for plan in plans:
        for count in rows:
            packed = _ints(count, steps.FIELDS)
            args = given, _pages(layout), _ints(count, width), state
            rest = extras if plan.sampled else None, packed, plan, shapes.steps
            yield functools.partial(_compile, steps.step, spec, *args, *rest)
        if plan.sampled:
            bits = jax.ShapeDtypeStruct((words(vocab),), jnp.uint32)
            bias = jax.ShapeDtypeStruct((vocab,), jnp.float32)
            yield functools.partial(_compile, steps.insert, extras, _ints(), bits, bits, bias)
