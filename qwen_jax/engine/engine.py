"""A model on a device: prefill in chunks, one decode step, many decode steps on the device.

Shapes come in buckets, so that another prompt of the same bucket compiles nothing.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.sample_tokens import pack
from qwen_jax.config import ModelConfig
from qwen_jax.engine import steps
from qwen_jax.engine.memory import check_cache_fits
from qwen_jax.engine.sampling import Counts, Plan, RowParameters
from qwen_jax.engine.steps import Emitted, Rows
from qwen_jax.engine.weights import PackedWeights
from qwen_jax.errors import UserError
from qwen_jax.model.cache import SMALLEST_CAPACITY, Cache
from qwen_jax.model.decoder import Parameters, activation_dtype

__all__ = ["Emitted", "Engine", "Prompt", "Rows"]

CHUNK = 512
"""Tokens of each row a prefill step takes at most; the last chunk is padded to a power of two."""

PACKED_CHUNK = 2048
"""Tokens of all rows together that a prefill step takes where the weights are packed, though never
fewer than `CHUNK` of each: every step puts the weights together again. The attention kernel keeps
no scores, whose memory would grow with the chunk."""

SMALLEST_CHUNK = 16


class Prompt(NamedTuple):
    """A prompt's ids and the most tokens it may be answered with."""

    tokens: Sequence[int]
    max_tokens: int


def bucket(n: int, smallest: int) -> int:
    """The least power of two that is at least n and `smallest`."""
    return max(smallest, 1 << (n - 1).bit_length())


def chunk_lengths(longest: int, chunk: int) -> list[int]:
    """The compiled lengths that together hold a prompt: full chunks, then a bucket."""
    full, rest = divmod(longest, chunk)
    return [chunk] * full + ([bucket(rest, SMALLEST_CHUNK)] if rest else [])


class Engine:
    """A model on a device and its compiled functions.

    Args:
        config: sizes and constants.
        weights: every parameter by its canonical name, already on the device, or packed for
            the decode-step kernel (`qwen_jax.engine.weights.prepare`).
        stop_ids: tokens that end a row; they are emitted, then the row is done.
        valid_tokens: vocabulary rows in use; ids from here on are never chosen.
        unused_ids: rows below them that no token has, and that are never chosen either.
        precision: of float32 matrix products.
        implementation: "auto", "mosaic_gpu" or "xla".

    Attributes:
        make_model: from weights inside a traced function to the model over them.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Parameters | PackedWeights,
        *,
        stop_ids: Sequence[int] = (),
        valid_tokens: int | None = None,
        unused_ids: Sequence[int] = (),
        precision: lax.Precision = lax.Precision.HIGHEST,
        implementation: str = "auto",
    ):
        make = functools.partial(
            steps.make_model, config, precision=precision, implementation=implementation
        )
        self.make_model = make
        self.weights = weights
        self.config = config
        self.stop_ids = tuple(stop_ids)
        table = weights.packed.tape if isinstance(weights, PackedWeights) else weights["embed"]
        self.platform = next(iter(table.devices())).platform
        self.cache_dtype = table.dtype
        rows = config.vocab_size
        self.valid_tokens = rows if valid_tokens is None else min(valid_tokens, rows)
        self._traced: list[str] = []
        stops = jnp.asarray(self.stop_ids, jnp.int32)
        constants = steps.Constants(stops, self.valid_tokens, tuple(unused_ids), implementation)
        self._create_cache = self._jit(
            steps.create_cache, config, self.cache_dtype, static=(0, 1, 2)
        )
        self._prefill_chunk = self._jit(steps.prefill_chunk, make, donate=1)
        self._begin = self._jit(steps.begin, make, constants, static=(4,))
        self._logits = self._jit(steps.chunk_logits, make, donate=1)
        self._decode = self._jit(steps.decode_many, make, constants, donate=1, static=(3, 4))

    def _jit(
        self,
        function: Callable[..., Any],
        *bound: object,
        donate: int | tuple[int, ...] = (),
        static: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """jit with the first arguments bound; counts in `compiled` each time it is traced."""

        # Not `self`: a cycle would keep the weights on the device after the engine is gone.
        names = self._traced

        @functools.wraps(function)
        def traced(*args: Any) -> Any:
            names.append(function.__name__)
            return function(*bound, *args)

        return jax.jit(traced, donate_argnums=donate, static_argnums=static)

    def over(self, weights: Parameters | PackedWeights, config: ModelConfig) -> "Engine":
        """These compiled functions over other weights of the same dtype and sizes.

        Of `config` only `source` may differ from this engine's.
        """
        other = copy.copy(self)
        other.weights, other.config = weights, config
        return other

    @property
    def compiled(self) -> int:
        """How many programs have been traced, and so compiled, so far."""
        return len(self._traced)

    def capacity(self, prompts: Sequence[Prompt]) -> int:
        """Slots a cache needs for these prompts and their answers, in buckets.

        Raises:
            UserError: a prompt is empty or leaves no room in the model's context.
        """
        context = self.config.context_length
        if not prompts:
            raise UserError("There are no prompts; give at least one.")
        vocab = self.config.vocab_size
        for prompt in prompts:
            if not prompt.tokens:
                raise UserError("The prompt is empty; give at least one token.")
            if len(prompt.tokens) >= context:
                raise UserError(
                    f"The prompt has {len(prompt.tokens)} tokens, but {self.config.source} has a "
                    f"context of {context} and the answer needs at least one; shorten the prompt."
                )
            if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < vocab:
                raise UserError(
                    f"The prompt has tokens from {min(prompt.tokens)} to {max(prompt.tokens)}, but "
                    f"{self.config.source} has tokens 0 to {vocab - 1}."
                )
        # A power of two, so the prompt's padded chunks fit too.
        longest = max(min(len(p.tokens) + p.max_tokens, context) for p in prompts)
        return bucket(longest, SMALLEST_CAPACITY)

    def create_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache as so many rows' decode steps take it; prefill takes either."""
        cache: Cache = self._create_cache(rows, capacity, self.fuses(rows))
        return cache

    def prefill(
        self,
        prompts: Sequence[Prompt],
        plan: Plan,
        params: RowParameters,
    ) -> tuple[Rows, Emitted]:
        """Runs the prompts, padded on the right, and chooses each row's first token.

        Raises:
            UserError: a prompt is empty or leaves no room in the context.
        """
        cache = self.create_cache(len(prompts), self.capacity(prompts))
        lengths = np.array([len(p.tokens) for p in prompts], np.int32)
        limits = np.minimum([p.max_tokens for p in prompts], self.config.context_length - lengths)
        last = jnp.zeros(
            (len(prompts), self.config.hidden_size), activation_dtype(self.cache_dtype)
        )
        start = 0
        for length in chunk_lengths(int(lengths.max()), self._chunk(len(prompts))):
            tokens = _pad([p.tokens[start : start + length] for p in prompts], length)
            cache, last = self._prefill_chunk(
                self.weights, cache, last, tokens, np.int32(start), lengths
            )
            start += length
        counts = _count_prompts(prompts, self.config.vocab_size) if plan.penalties else None
        rows = (lengths, limits.astype(np.int32), counts)
        state, emitted = self._begin(self.weights, last, rows, params, plan)
        return Rows(cache=cache, **state), emitted

    def _chunk(self, rows: int) -> int:
        """The tokens of each row that a prefill step takes."""
        if isinstance(self.weights, PackedWeights):
            return max(CHUNK, PACKED_CHUNK // bucket(rows, 1))
        return CHUNK

    def decode_many(
        self, rows: Rows, params: RowParameters, plan: Plan, steps: int
    ) -> tuple[Rows, Emitted]:
        """`steps` decode steps without leaving the device; what they chose is `[steps, B]`.

        The rows passed in are donated. The trip count is fixed, since a loop that ends by
        a condition on the device would ask the host at every step.
        """
        return self._decode(self.weights, rows, params, plan, steps)

    def fuses(self, rows: int) -> bool:
        """Whether so many rows take their steps through the decode-step kernel."""
        return isinstance(self.weights, PackedWeights) and self.weights.serves(rows)

    def decode_step(self, rows: Rows, params: RowParameters, plan: Plan) -> tuple[Rows, Emitted]:
        """One decode step; the rows passed in are donated."""
        rows, emitted = self.decode_many(rows, params, plan, 1)
        return rows, jax.tree.map(lambda x: x[0], emitted)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after every position of one text, float32 `[T, V]`, on the host.

        Raises:
            UserError: the text is empty or longer than the context.
        """
        context = self.config.context_length
        if not 0 < len(tokens) <= context:
            raise UserError(
                f"logits need 1 to {context} tokens, the context of {self.config.source}, "
                f"but got {len(tokens)}."
            )
        # Whatever the weights: longer chunks have more logits.
        lengths = chunk_lengths(len(tokens), CHUNK)
        cache = self.create_cache(1, bucket(sum(lengths), SMALLEST_CAPACITY))
        out = np.empty((len(tokens), self.config.vocab_size), np.float32)
        start = 0
        for length in lengths:
            part = tokens[start : start + length]
            padded = _pad([part], length)
            cache, logits = self._logits(
                self.weights, cache, padded, np.int32(start), np.array([len(tokens)], np.int32)
            )
            # Cut on the host: a slice on the device would be compiled for every length.
            out[start : start + len(part)] = np.asarray(logits)[0, : len(part)]
            start += length
        return out


def _pad(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    out = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _count_prompts(prompts: Sequence[Prompt], vocab: int) -> Counts:
    seen = pack([prompt.tokens for prompt in prompts], vocab)
    return Counts(jnp.asarray(seen), jnp.zeros((len(prompts), vocab), jnp.int32))


def check_fits(engine: Engine, prompts: Sequence[Prompt], rows: int) -> None:
    """Raises UserError, besides where `Engine.capacity` does, where a cache of so many rows, each
    with room for any of these prompts, is more than the device has free."""
    check_cache_fits(engine.config, engine.cache_dtype, rows, engine.capacity(prompts))
