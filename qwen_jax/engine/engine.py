"""A model on a device: its weights, what its programs are made for, and its pool of pages."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import lax
from jaxtyping import Float

from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.compiling import Layout, compile_ahead
from qwen_jax.engine.memory import pool_pages, show_bytes
from qwen_jax.engine.pool import Pool
from qwen_jax.engine.sampling import PLANS, Plan
from qwen_jax.engine.shapes import fitting, pieces_of, shapes_for
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.steps import Extras, State
from qwen_jax.engine.weights import PlainWeights, Weights
from qwen_jax.errors import UserError
from qwen_jax.model.cache import PAGE, bytes_per_token, create_pages, pages_for
from qwen_jax.model.decoder import Parameters


class Engine:
    """A model on a device.

    Args:
        config: sizes and constants.
        weights: every parameter by its canonical name, already on the device, or packed for
            the decode-step kernel (`qwen_jax.engine.weights.prepare`).
        stop_ids: tokens that end a row; they are emitted, then the row is done.
        valid_tokens: vocabulary rows in use; ids from here on are never chosen.
        unused_ids: rows below them that no token has, and that are never chosen either.
        precision: of float32 matrix products.
        implementation: "auto", "mosaic_gpu" or "xla".
        slots: rows that generate at the same time; by default what suits the platform.
        cache_tokens: positions of the cache; by default what is needed, or fits.

    Attributes:
        spec: what its programs are compiled for.
        shapes: and the sizes of their calls.
        pool: who holds which pages.
        pages, state, extras: what the device holds between calls, made when first asked for.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Parameters | Weights,
        *,
        stop_ids: Sequence[int] = (),
        valid_tokens: int | None = None,
        unused_ids: Sequence[int] = (),
        precision: lax.Precision = lax.Precision.HIGHEST,
        implementation: str = "auto",
        slots: int | None = None,
        cache_tokens: int | None = None,
    ):
        self.config = config
        self.weights: Weights = PlainWeights(weights) if isinstance(weights, Mapping) else weights
        rows = config.vocab_size
        self.spec = Spec(
            config,
            self.weights.dtype,
            self.weights.dtype,
            precision,
            implementation,
            tuple(stop_ids),
            rows if valid_tokens is None else min(valid_tokens, rows),
            tuple(unused_ids),
        )
        self.platform = next(iter(self.weights.devices())).platform
        self.shapes = shapes_for(self.platform, slots)
        size = (
            pool_pages(config, self.spec.cache, self.shapes.slots, self.platform)
            if cache_tokens is None
            else pages_for(cache_tokens)
        )
        self.pool = Pool(1 + size)
        self._pages: jax.Array | None = None
        self._compiled: set[tuple[int, Plan]] = set()
        self.state = State.create(self.shapes.slots)
        self._extras: Extras | None = None

    @property
    def pages(self) -> steps.Pages:
        if self._pages is None:
            self._pages = create_pages(self.config, 1 + self.pool.size, self.spec.cache)
        return self._pages

    @pages.setter
    def pages(self, pages: steps.Pages) -> None:
        self._pages = pages

    @property
    def extras(self) -> Extras:
        if self._extras is None:
            self._extras = Extras.create(self.shapes.slots, self.config.vocab_size)
        return self._extras

    @extras.setter
    def extras(self, extras: Extras) -> None:
        self._extras = extras

    @property
    def layout(self) -> Layout:
        """What decides the shapes of its programs."""
        return Layout(self.spec, self.shapes, 1 + self.pool.size)

    def compile(self, rows: Sequence[int] | None = None, plans: Sequence[Plan] = PLANS) -> None:
        """Compiles what texts need, all of it by default, so that nothing is compiled after."""
        sizes = self.shapes.rows if rows is None else rows
        for future in compile_ahead(self.layout, self.weights, sizes, plans):
            future.result()
        self._compiled |= {(size, plan) for size in sizes for plan in plans}

    def rows_for(self, texts: int, plan: Plan) -> int:
        """How many rows a step of so many texts has: the fewest that hold them, unless there is a
        program of more rows and none of so many."""
        size = fitting(self.shapes.rows, texts)
        larger = [n for n in self.shapes.rows if n >= size and (n, plan) in self._compiled]
        chosen = min(larger, default=size)
        self._compiled.add((chosen, plan))
        return chosen

    def room(self, tokens: Sequence[int], max_tokens: int) -> int:
        """How many tokens may follow a prompt: so many, or what the context has left.

        Raises:
            UserError: the prompt is empty, not of this vocabulary, leaves no room in the model's
                context, or is with its answer more than the whole cache.
        """
        context, vocab = self.config.context_length, self.config.vocab_size
        if not tokens:
            raise UserError("The prompt is empty; give at least one token.")
        if len(tokens) >= context:
            raise UserError(
                f"The prompt has {len(tokens)} tokens, but {self.config.source} has a "
                f"context of {context} and the answer needs at least one; shorten the prompt."
            )
        if not 0 <= min(tokens) <= max(tokens) < vocab:
            raise UserError(
                f"The prompt has tokens from {min(tokens)} to {max(tokens)}, but "
                f"{self.config.source} has tokens 0 to {vocab - 1}."
            )
        room = min(max_tokens, context - len(tokens))
        self.check_fits(len(tokens) + room - 1)  # the last one never enters
        return room

    def check_fits(self, positions: int) -> None:
        """Raises UserError where so many tokens of one text are more than the whole cache."""
        if pages_for(positions) > self.pool.size:
            each = bytes_per_token(self.config, self.spec.cache.itemsize)
            raise UserError(
                f"A text of {positions} tokens needs {show_bytes(positions * each)} for keys and "
                f"values, but there is room for {self.pool.size * PAGE} tokens, "
                f"{show_bytes(self.pool.size * PAGE * each)}, on this device; lower max_tokens, or "
                "shorten the prompt."
            )

    def logits(self, tokens: Sequence[int]) -> Float[np.ndarray, "T V"]:
        """Logits after every position of one text, float32, on the host.

        Raises:
            UserError: the text is empty or longer than the context.
        """
        context = self.config.context_length
        if not 0 < len(tokens) <= context:
            raise UserError(
                f"logits need 1 to {context} tokens, the context of {self.config.source}, "
                f"but got {len(tokens)}."
            )
        self.check_fits(len(tokens))
        if (needed := pages_for(len(tokens))) > self.pool.available:
            raise UserError("The cache is taken by texts that are being generated; finish them.")
        held = self.pool.take(needed)
        table = np.zeros((1, self.layout.table_width), np.int32)
        table[0, : len(held)] = held
        out = np.empty((len(tokens), self.config.vocab_size), np.float32)
        for start, length, padded in pieces_of(0, len(tokens), self.shapes):
            part = np.zeros((1, padded), np.int32)
            part[0, :length] = tokens[start : start + length]
            at, end = np.array([start], np.int32), np.array([start + length], np.int32)
            self.pages, found = steps.logits(
                self.spec, self.weights, self.pages, table, part, at, end
            )
            # Cut on the host: a slice on the device would be compiled for every length.
            out[start : start + length] = np.asarray(found)[0, :length]
        self.pool.release(held)
        return out
