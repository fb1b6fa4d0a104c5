"""All that decides the shapes of an engine's programs, known before its weights are there."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, Unpack

import jax.numpy as jnp
from jax import lax

from qwen_jax.config import ModelConfig
from qwen_jax.engine.memory import Budget, pool_pages
from qwen_jax.engine.shapes import Shapes, fitting, shapes_for
from qwen_jax.engine.spec import Spec
from qwen_jax.model.cache import PAGE, pages_for
from qwen_jax.model.split import WHOLE, Whole


class EngineOptions(TypedDict, total=False):
    """How an engine is to run a model.

    Attributes:
        stop_ids: tokens that end a text; they are emitted, then it is done.
        valid_tokens: vocabulary rows in use; ids from here on are never chosen. All by default.
        unused_ids: rows below them that no token has, and that are never chosen either.
        cache: dtype of keys and values; by default that of the parameters.
        precision: of float32 matrix products; HIGHEST by default.
        implementation: "auto", the default, "mosaic_gpu" or "xla".
        slots: texts that are generated at the same time; by default what suits the platform.
        texts: how many there will be at most, where that is known: the cache is no larger then.
        cache_tokens: positions that the cache has room for; by default what is needed, or fits.
        batch_invariant: whether a text's tokens and log-probabilities are, bit for bit, the same
            whatever runs beside it: see `shapes_for`. False by default.
        split: the devices that have the model together; by default the first one has all of it.
        sharers: devices that take as much memory as one of these, which on a CPU is the same; by
            default those of `split`.
        draft_tokens: tokens of a text that are drafted for one step, at most; 0, the default, for
            no speculation: see `docs/speculation.md`.
        draft_bytes: what a token takes in the cache of a draft model.
    """

    stop_ids: Sequence[int]
    valid_tokens: int
    unused_ids: Sequence[int]
    cache: jnp.dtype | None
    precision: lax.Precision
    implementation: str
    slots: int | None
    texts: int | None
    cache_tokens: int | None
    batch_invariant: bool
    split: Whole
    sharers: int
    draft_tokens: int
    draft_bytes: int


class Layout(NamedTuple):
    """What an engine's programs are compiled for.

    Attributes:
        spec: the static argument of all.
        shapes: sizes of their calls.
        pages: of the cache, for one layer; the one of nobody is among them.
        draft_tokens: drafted for a text in a step, at most; 0 where nothing is.
    """

    spec: Spec
    shapes: Shapes
    pages: int
    draft_tokens: int = 0

    @property
    def unmasked(self) -> bool:
        """Whether texts may be let go by their constraint's masks. Drafts are for texts without a
        constraint, and where there are any every step is of such."""
        return self.shapes.unmasked and not self.draft_tokens

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        dtype: jnp.dtype,
        platform: str,
        *,
        loaded: bool,
        held: int | None = None,
        **options: Unpack[EngineOptions],
    ) -> "Layout":
        """For weights in `dtype`, which are on the device already or not `loaded` yet.

        Args:
            held: bytes of a device's weights, where they are not all in `dtype`.

        Raises:
            UserError: there is no room for a cache.
        """
        split, cache = options.get("split", WHOLE), options.get("cache")
        cache = dtype if cache is None else cache
        spec = Spec(
            config,
            weights=dtype,
            cache=cache,
            precision=options.get("precision", lax.Precision.HIGHEST),
            implementation=options.get("implementation", "auto"),
            stop_ids=tuple(options.get("stop_ids", ())),
            valid_tokens=min(options.get("valid_tokens", config.vocab_size), config.vocab_size),
            unused_ids=tuple(options.get("unused_ids", ())),
            split=split,
        )
        shapes = shapes_for(platform, options.get("slots"), options.get("batch_invariant", False))
        tokens = options.get("cache_tokens")
        if tokens is None:
            part, sharers = split.part(config), options.get("sharers", split.size)
            budget = Budget.of(part, dtype, held, sharers)
            free = budget.free if loaded else budget.free - budget.weights
            # A program's sizes, so that a file of 30 prompts compiles no other than one of 40.
            texts = fitting(shapes.rows, options.get("texts") or shapes.slots)
            beside = options.get("draft_bytes", 0)
            pages = pool_pages(part, cache, texts, platform, free, beside)
        else:
            pages = pages_for(tokens)
        return cls(spec, shapes, 1 + pages, options.get("draft_tokens", 0))

    @property
    def cache_tokens(self) -> int:
        """Positions that the cache has room for."""
        return (self.pages - 1) * PAGE

    @property
    def table_width(self) -> int:
        """Pages of a text as long as the context, or as the cache where that is shorter."""
        return min(pages_for(self.spec.config.context_length), self.pages - 1)
