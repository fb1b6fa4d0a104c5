"""A model on a device: its weights, what its programs are made for, and its pool of pages."""

import threading
import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Unpack

import jax
import numpy as np
from jaxtyping import Float, Int

from qwen_jax.config import ModelConfig
from qwen_jax.engine import calls, steps
from qwen_jax.engine.compiling import Programs, compile_ahead
from qwen_jax.engine.layout import EngineOptions, Layout
from qwen_jax.engine.memory import show_bytes
from qwen_jax.engine.pool import Pool
from qwen_jax.engine.sampling import IN_HALVES, Plan
from qwen_jax.engine.shapes import Shapes, fitting, pieces_of
from qwen_jax.engine.shared import Shared
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.unmasked import Agreement
from qwen_jax.engine.weights import PlainWeights, Weights
from qwen_jax.errors import ContextFullError, UserError
from qwen_jax.model.cache import HEADS, PAGE, bytes_per_token, create_pages, pages_for

if TYPE_CHECKING:  # Flax is heavy, and only tracing needs it
    from qwen_jax.model.decoder import Parameters

FEW_CALLS = 4
"""So many take less time than to compile a program."""


class Engine:
    """A model on a device.

    Args:
        config: sizes and constants.
        weights: every parameter by its canonical name, already on the device, or packed for
            the decode-step kernel (`qwen_jax.engine.weights.prepare`).
        options: see `EngineOptions`.

    Attributes:
        layout: what its programs are compiled for; `spec` and `shapes` are parts of it.
        pool: who holds which pages.
        pages: what the device holds of them between calls, made when first asked for.
        draft: the draft model, where there is one; its pages are used as this one's are.
        others: engines of the same model on other devices, which take a share of its texts.
        agreements: by form of a constraint.
        shared: what those share who ask for texts at the same time.
        lock: held by who deals pages out or calls a program, which takes the pool along.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: "Parameters | Weights",
        **options: Unpack[EngineOptions],
    ):
        self.config = config
        self.weights: Weights = PlainWeights(weights) if isinstance(weights, Mapping) else weights
        self.platform = next(iter(self.weights.devices())).platform
        self.layout = Layout.of(config, self.weights.dtype, self.platform, loaded=True, **options)
        self.pool = Pool(self.layout.pages)
        self.draft: Engine | None = None
        self.others: tuple[Engine, ...] = ()
        self.agreements: weakref.WeakKeyDictionary[Hashable, Agreement] = (
            weakref.WeakKeyDictionary()
        )
        self.shared = Shared()
        self.lock = threading.RLock()
        self._pages: jax.Array | None = None
        self._rows: set[tuple[int, Plan, bool]] = set()
        self._pieces: set[tuple[int, bool, int]] = set()

    @property
    def spec(self) -> Spec:
        return self.layout.spec

    @property
    def shapes(self) -> Shapes:
        return self.layout.shapes

    @property
    def pages(self) -> steps.Pages:
        if self._pages is None:
            spec, there = self.spec, self.spec.split.sharding(HEADS)
            self._pages = create_pages(spec.cached, self.layout.pages, spec.cache, sharding=there)
        return self._pages

    @pages.setter
    def pages(self, pages: steps.Pages) -> None:
        self._pages = pages

    def revive(self) -> None:
        """Before pages are dealt out: a call that failed, or an interrupt just after one, has taken
        the pool along, and what it held is lost."""
        engines = [self] if self.draft is None else [self, self.draft]
        if any(one._pages is not None and one._pages.is_deleted() for one in engines):
            for one in engines:
                one._pages = None
            self.pool.forget_all()

    @property
    def bytes_per_token(self) -> int:
        """What a token takes in the cache."""
        return bytes_per_token(self.spec.split.part(self.config), self.spec.cache.itemsize)

    def drafts_with(self, draft: "Engine") -> None:
        """Has a smaller model of the same vocabulary draft, which takes as many pages."""
        draft.layout = draft.layout._replace(pages=self.layout.pages)
        self.draft = draft

    def compile(self, *, constrained: bool = False) -> None:
        """Compiles all that requests usually need, so that nothing is compiled after.

        Args:
            constrained: some may have a constraint.
        """
        for other in self.others:
            other.compile(constrained=constrained)
        programs = Programs.of(self.shapes, constrained)
        draft = None if self.draft is None else (self.draft.layout, self.draft.weights)
        for future in compile_ahead(self.layout, self.weights, programs, draft):
            future.result()
        self.expect(programs)

    def expect(self, programs: Programs) -> None:
        """Tells that these programs are compiled, or will be: others of the kind do without."""
        extends = self.shapes.extends(programs.pieces)
        self._pieces |= {(length, False, size) for length, size in extends}
        self._rows |= {(size, plan, False) for size in programs.rows for plan in programs.plans}
        self._rows |= {(size, IN_HALVES, True) for size, _ in programs.halves}

    def rows_for(self, texts: int, plan: Plan, in_halves: bool = False) -> int:
        """Rows of a step of so many texts: the fewest that hold them, unless there is a program of
        more rows and none of so few.

        Args:
            in_halves: it is one of `advance` and `choose`.
        """
        size = fitting(self.shapes.rows, texts)
        larger = [n for n, *of in self._rows if n >= size and of == [plan, in_halves]]
        chosen = min(larger, default=size)
        self._rows.add((chosen, plan, in_halves))
        return chosen

    def pieces_for(self, count: int, length: int, scored: bool = False) -> int:
        """Pieces of each call of `extend`, or of `score`, where there are so many of a length in
        all: by the same rule, but two calls are better than one that is mostly padding; and few
        calls of a smaller program that is there do, too."""
        size = fitting(self.shapes.sizes(length), -(-count // 2))
        there = [n for *of, n in self._pieces if of == [length, scored]]
        larger = [n for n in there if n >= size]
        smaller = [n for n in there if n < size and n * FEW_CALLS >= count]
        chosen = min(larger) if larger else max(smaller, default=size)
        self._pieces.add((length, scored, chosen))
        return chosen

    def room(self, tokens: Sequence[int], max_tokens: int) -> int:
        """How many tokens may follow a prompt: so many, or what the context has left.

        Args:
            max_tokens: 0 where there is to be no answer.

        Raises:
            ContextFullError: the prompt leaves no room for an answer, if there is to be one.
            UserError: it is empty, not of this vocabulary, or with its answer more than the whole
                cache.
        """
        context = self.config.context_length
        if not tokens:
            raise UserError("The prompt is empty; give at least one token.")
        if len(tokens) + min(max_tokens, 1) > context:
            and_one = " and the answer needs at least one" * (max_tokens > 0)
            raise ContextFullError(
                f"The prompt has {len(tokens)} tokens, but {self.config.source} has a "
                f"context of {context}{and_one}; shorten the prompt.",
                tokens=len(tokens),
                context=context,
            )
        self.check_ids(tokens, "The prompt")
        room = min(max_tokens, context - len(tokens))
        self.check_fits(len(tokens) + room - 1)  # the last one never enters
        return room

    def check_ids(self, tokens: Sequence[int], said: str) -> None:
        """Raises UserError where one of some tokens, of which that is said, is not of this
        vocabulary."""
        vocab = self.config.vocab_size
        if len(tokens) == 0 or 0 <= min(tokens) <= max(tokens) < vocab:
            return
        at = next(i for i, token in enumerate(tokens) if not 0 <= token < vocab)
        raise UserError(
            f"{said} has the token {tokens[at]} at index {at}, but {self.config.source} has tokens "
            f"0 to {vocab - 1}."
        )

    def check_fits(self, positions: int) -> None:
        """Raises UserError where so many tokens of one text are more than the whole cache."""
        if pages_for(positions) > self.pool.size:
            each = self.bytes_per_token
            raise UserError(
                f"A text of {positions} tokens needs {show_bytes(positions * each)} for keys and "
                f"values, but there is room for {self.pool.size * PAGE} tokens, "
                f"{show_bytes(self.pool.size * PAGE * each)}, on this device; lower max_tokens, or "
                "shorten the prompt."
            )

    def tables(self, held: Sequence[Sequence[int]], rows: int) -> Int[np.ndarray, "R n"]:
        """Block tables of so many rows, of which the first ones hold these pages."""
        tables = np.zeros((rows, self.layout.table_width), np.int32)
        for table, pages in zip(tables, held, strict=False):
            table[: len(pages)] = pages
        return tables

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
        with self.lock:
            return self._logits(tokens)

    def _logits(self, tokens: Sequence[int]) -> Float[np.ndarray, "T V"]:
        if (needed := pages_for(len(tokens))) > self.pool.available:
            raise UserError("The cache is taken by texts that are being generated; finish them.")
        self.revive()
        held = self.pool.take(needed)
        table = self.tables([held], 1)
        out = np.empty((len(tokens), self.config.vocab_size), np.float32)
        try:
            for start, length, padded in pieces_of(0, len(tokens), self.shapes):
                part = np.zeros((1, padded), np.int32)
                part[0, :length] = tokens[start : start + length]
                at, end = np.array([start], np.int32), np.array([start + length], np.int32)
                self.pages, found = calls.logits(
                    self.spec, self.weights, self.pages, table, part, at, end
                )
                # Cut on the host: a slice on the device would be compiled for every length.
                out[start : start + length] = np.asarray(found)[0, :length]
        finally:
            self.pool.release(held)
        return out
