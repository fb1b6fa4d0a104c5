"""One decode step of an engine's texts, by its kernel as it is but for keeping what is inside."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_step import of_few_rows, read_inside, recorded
from pallas_kernels.decode_step import refusal as kernel_refusal
from qwen_jax.accuracy.inside.judging import RecordedStep
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.weights import PackedWeights, refusal
from qwen_jax.model.cache import PAGE, Cache
from qwen_jax.model.rotary import inverse_frequencies
from qwen_jax.model.split import Split

NOT_ASKED = "--implementation=xla leaves it out"


def why_not(engine: Engine, rows: int = 1) -> str | None:
    """Why an engine's decode steps of so many rows don't run on the kernel, or None."""
    weights = engine.weights
    if isinstance(engine.spec.split, Split):
        return "it looks into the kernel of one device, and the model is on several"
    if not isinstance(weights, PackedWeights):
        return refusal(engine.config, engine.spec.cache) or NOT_ASKED
    if weights.implementation == "xla":
        return NOT_ASKED
    return kernel_refusal(weights.plan, rows, weights.dtype, engine.config.rope_dim // 2)


def record_step(engine: Engine, texts: Sequence[Sequence[int]]) -> RecordedStep:
    """A step that takes the last token of each text, the others being in the cache.

    Args:
        engine: with weights that are packed, where the kernel runs (`why_not`).
    """
    weights, spec = engine.weights, engine.spec
    assert isinstance(weights, PackedWeights)
    ends = np.array([len(text) - 1 for text in texts], np.int32)
    cache = Cache.create(engine.config, len(texts), int(ends.max()) + 1, spec.cache)
    pages = cache.pages
    for first in range(0, int(ends.max()), PAGE):
        tokens = np.zeros((len(texts), PAGE), np.int32)
        for row, text in enumerate(texts):
            piece = text[first : min(first + PAGE, ends[row])]
            tokens[row, : len(piece)] = piece
        # A row whose text has ended is not there.
        lengths = np.where(ends > first, np.minimum(ends, first + PAGE), 0).astype(np.int32)
        start = np.full(len(texts), first, np.int32)
        pages = steps.extend(spec, weights, pages, cache.tables, tokens, start, lengths)
    last = np.array([text[-1] for text in texts], np.int32)
    hidden, logits, new, scratch = launched(weights, pages, cache.tables, last, ends)
    plan, rows = weights.plan, len(texts)
    return RecordedStep(
        few=of_few_rows(plan, rows, spec.cache),
        hidden=np.asarray(hidden, np.float32),
        pages=pages,
        tables=np.asarray(cache.tables),
        position=ends,
        logits=np.asarray(logits),
        new=np.asarray(new),
        inside=read_inside(np.asarray(scratch), plan, rows, spec.cache),
    )


@jax.jit
def launched(
    weights: PackedWeights,
    pages: Float[Array, "2L P K C H"],
    tables: Int[Array, "B n"],
    token: Int[Array, "B"],
    position: Int[Array, "B"],
) -> tuple[
    Float[Array, "B D"], Float[Array, "B V"], Float[Array, "2L B K H"], Int[Array, " words"]
]:
    """The tokens' embeddings, and what `decode_step.recorded` returns for them."""
    hidden = weights.look_up(token)
    logits, new, scratch = recorded(
        weights.packed,
        weights.plan,
        hidden,
        pages,
        tables,
        position,
        jnp.asarray(inverse_frequencies(weights.config)),
        attention_factor=weights.config.attention_factor,
    )
    return hidden, logits, new, scratch
