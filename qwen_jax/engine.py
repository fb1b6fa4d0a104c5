"""The jitted functions: prefill in chunks, one decode step, many decode steps on the device.

Everything works on rows, each with its own length, budget, sampling state and done flag.
Position is data, not shape: a growing text never recompiles, nor does another prompt of
the same bucket.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qwen_jax import sampling
from qwen_jax.cache import KVCache
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.model import Parameters, Qwen2
from qwen_jax.sampling import Choice, Counts, Plan, RowParameters

CHUNK = 512
"""Tokens a prefill step takes at most; a prompt's last chunk is padded to a power of two."""

SMALLEST_CHUNK = 16
SMALLEST_CAPACITY = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The state of B rows between two decode steps.

    Attributes:
        cache: keys and values of the tokens so far, without `token`.
        length: tokens in the cache.
        token: chosen last, and the next to enter the cache.
        generated: tokens chosen so far, `token` included.
        limit: tokens the row may generate; it is done when it has.
        done: the row chose a stop token or reached its limit; its later tokens mean nothing.
        counts: tokens by id, where the sampling plan has penalties.
    """

    cache: KVCache
    length: Int[Array, "B"]
    token: Int[Array, "B"]
    generated: Int[Array, "B"]
    limit: Int[Array, "B"]
    done: Bool[Array, "B"]
    counts: Counts | None


class Emitted(NamedTuple):
    """What one step chose, and which rows it was still for."""

    choice: Choice
    live: Bool[Array, "B"]


class Prompt(NamedTuple):
    """A prompt's ids and the most tokens it may be answered with."""

    tokens: Sequence[int]
    max_tokens: int


def bucket(n: int, smallest: int) -> int:
    """The least power of two that is at least n and `smallest`."""
    return max(smallest, 1 << (n - 1).bit_length())


def chunk_lengths(longest: int) -> list[int]:
    """The compiled lengths that together hold a prompt: full chunks, then a bucket."""
    full, rest = divmod(longest, CHUNK)
    return [CHUNK] * full + ([bucket(rest, SMALLEST_CHUNK)] if rest else [])


class Engine:
    """A model on a device and its compiled functions.

    Args:
        config: sizes and constants.
        params: every parameter by its canonical name, already on the device.
        stop_ids: tokens that end a row; they are emitted, then the row is done.
        valid_tokens: vocabulary rows in use; ids from here on are never chosen.
        precision: of float32 matrix products.
        implementation: "auto", "mosaic_gpu" or "xla".

    Attributes:
        compiled: how many programs have been traced, and so compiled, so far.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Parameters,
        *,
        stop_ids: Sequence[int] = (),
        valid_tokens: int | None = None,
        precision: lax.Precision = lax.Precision.HIGHEST,
        implementation: str = "auto",
    ):
        model = Qwen2(config, params, precision=precision, implementation=implementation)
        graph, self.state = nnx.split(model)
        self.config = config
        self.stop_ids = tuple(stop_ids)
        self.platform = next(iter(params["embed"].devices())).platform
        self.cache_dtype = params["embed"].dtype
        valid = config.vocab_size if valid_tokens is None else valid_tokens
        self.compiled = 0
        constants = _Constants(jnp.asarray(self.stop_ids, jnp.int32), valid)
        self._create_cache = self._jit(_create_cache, config, self.cache_dtype, static=(0, 1))
        self._prefill_chunk = self._jit(_prefill_chunk, graph, donate=1)
        self._begin = self._jit(_begin, graph, constants, static=(4,))
        self._logits = self._jit(_chunk_logits, graph, donate=1)
        self._decode = self._jit(_decode_many, graph, constants, donate=1, static=(3, 4))

    def _jit(
        self,
        function: Callable[..., Any],
        *bound: object,
        donate: int | tuple[int, ...] = (),
        static: tuple[int, ...] = (),
    ) -> Callable[..., Any]:
        """jit with the first arguments bound; counts in `compiled` each time it is traced."""

        @functools.wraps(function)
        def traced(*args: Any) -> Any:
            self.compiled += 1
            return function(*bound, *args)

        return jax.jit(traced, donate_argnums=donate, static_argnums=static)

    def capacity(self, prompts: Sequence[Prompt]) -> int:
        """Slots a cache needs for these prompts and their answers, in buckets.

        Raises:
            UserError: a prompt is empty or leaves no room in the model's context.
        """
        context = self.config.context_length
        for prompt in prompts:
            if not prompt.tokens:
                raise UserError("The prompt is empty; give at least one token.")
            if len(prompt.tokens) >= context:
                raise UserError(
                    f"The prompt has {len(prompt.tokens)} tokens, but {self.config.source} has a "
                    f"context of {context} and the answer needs at least one; shorten the prompt."
                )
        padded = sum(chunk_lengths(max(len(p.tokens) for p in prompts)))
        # The last token is never fed back, but a prompt and answer that fill the context fit.
        longest = max(min(len(p.tokens) + p.max_tokens, context) for p in prompts)
        return max(padded, bucket(longest, SMALLEST_CAPACITY))

    def prefill(
        self,
        prompts: Sequence[Prompt],
        plan: Plan,
        params: RowParameters,
        on_chunk: Callable[[int], None] = lambda tokens: None,
    ) -> tuple[Rows, Emitted]:
        """Runs the prompts, padded on the right, and chooses each row's first token.

        Args:
            on_chunk: told how many prompt tokens each chunk held, for a progress bar.

        Raises:
            UserError: a prompt is empty or leaves no room in the context.
        """
        cache = self._create_cache(len(prompts), self.capacity(prompts))
        lengths = np.array([len(p.tokens) for p in prompts], np.int32)
        limits = np.minimum([p.max_tokens for p in prompts], self.config.context_length - lengths)
        last = jnp.zeros((len(prompts), self.config.hidden_size), self.activation_dtype)
        start = 0
        for length in chunk_lengths(int(lengths.max())):
            tokens = _pad([p.tokens[start : start + length] for p in prompts], length)
            cache, last = self._prefill_chunk(
                self.state, cache, last, tokens, np.int32(start), lengths
            )
            on_chunk(min(length, int(lengths.max()) - start))
            start += length
        counts = _count_prompts(prompts, self.config.vocab_size) if plan.penalties else None
        rows = (lengths, limits.astype(np.int32), counts)
        state, emitted = self._begin(self.state, last, rows, params, plan)
        return Rows(cache=cache, **state), emitted

    def decode_many(
        self, rows: Rows, params: RowParameters, plan: Plan, steps: int
    ) -> tuple[Rows, Emitted]:
        """`steps` decode steps without leaving the device; what they chose is `[steps, B]`.

        The rows passed in are donated. The trip count is fixed, since a loop that ends by
        a condition on the device would ask the host at every step.
        """
        return self._decode(self.state, rows, params, plan, steps)

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
        lengths = chunk_lengths(len(tokens))
        cache = self._create_cache(1, bucket(sum(lengths), SMALLEST_CAPACITY))
        out = np.empty((len(tokens), self.config.vocab_size), np.float32)
        start = 0
        for length in lengths:
            part = tokens[start : start + length]
            padded = _pad([part], length)
            cache, logits = self._logits(
                self.state, cache, padded, np.int32(start), np.array([len(tokens)], np.int32)
            )
            # Cut on the host: a slice on the device would be compiled for every length.
            out[start : start + len(part)] = np.asarray(logits)[0, : len(part)]
            start += length
        return out

    @property
    def activation_dtype(self) -> jnp.dtype:
        """float16 parameters run with float32 activations: see `model.matmul`."""
        return jnp.dtype(jnp.float32 if self.cache_dtype == jnp.float16 else self.cache_dtype)


def _create_cache(config: ModelConfig, dtype: jnp.dtype, rows: int, capacity: int) -> KVCache:
    return KVCache.create(config, rows, capacity, dtype)


class _Constants(NamedTuple):
    stop_ids: Int[Array, "stops"]
    valid_tokens: int


def _pad(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    out = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _count_prompts(prompts: Sequence[Prompt], vocab: int) -> Counts:
    seen = np.zeros((len(prompts), vocab), bool)
    for i, prompt in enumerate(prompts):
        seen[i, list(prompt.tokens)] = True
    return Counts(jnp.asarray(seen), jnp.zeros(seen.shape, jnp.int32))


def _prefill_chunk(
    graph: nnx.GraphDef,
    state: nnx.State,
    cache: KVCache,
    last: Float[Array, "B D"],
    tokens: Int[Array, "B T"],
    start: Int[Array, ""],
    lengths: Int[Array, "B"],
) -> tuple[KVCache, Float[Array, "B D"]]:
    """One chunk of every prompt; keeps the hidden state of the rows that end in it."""
    hidden, cache = _run_chunk(graph, state, cache, tokens, start, lengths)
    at = lengths - 1 - start
    ends_here = (at >= 0) & (at < tokens.shape[1])
    at = jnp.clip(at, 0, tokens.shape[1] - 1)
    here = jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]
    return cache, jnp.where(ends_here[:, None], here, last)


def _run_chunk(
    graph: nnx.GraphDef,
    state: nnx.State,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    start: Int[Array, ""],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B T D"], KVCache]:
    starts = jnp.full_like(lengths, start)
    # A row that ended in an earlier chunk still has slots to see: those of its own prompt.
    valid = jnp.minimum(lengths, start + tokens.shape[1])
    return nnx.merge(graph, state)(tokens, cache, starts, valid)


def _chunk_logits(
    graph: nnx.GraphDef,
    state: nnx.State,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    start: Int[Array, ""],
    lengths: Int[Array, "B"],
) -> tuple[KVCache, Float[Array, "B T V"]]:
    hidden, cache = _run_chunk(graph, state, cache, tokens, start, lengths)
    return cache, nnx.merge(graph, state).logits(hidden)


def _choose(
    model: Qwen2,
    constants: _Constants,
    hidden: Float[Array, "B D"],
    params: RowParameters,
    counts: Counts | None,
    generated: Int[Array, "B"],
    live: Bool[Array, "B"],
    plan: Plan,
) -> tuple[Choice, Counts | None, Bool[Array, "B"]]:
    """Hidden states to tokens, the counts with live rows' in, and whether each is a stop."""
    logits = model.logits(hidden[:, None])[:, 0]
    in_use = jnp.arange(logits.shape[-1]) < constants.valid_tokens
    choice = sampling.choose(jnp.where(in_use, logits, -jnp.inf), params, counts, generated, plan)
    if counts is not None:
        rows = jnp.arange(choice.token.shape[0])
        counts = counts._replace(generated=counts.generated.at[rows, choice.token].add(live))
    stopped = (choice.token[:, None] == constants.stop_ids).any(axis=1)
    return choice, counts, stopped


def _begin(
    graph: nnx.GraphDef,
    constants: _Constants,
    state: nnx.State,
    last: Float[Array, "B D"],
    rows: tuple[Int[Array, "B"], Int[Array, "B"], Counts | None],
    params: RowParameters,
    plan: Plan,
) -> tuple[dict[str, jax.Array | Counts | None], Emitted]:
    """The first token of every row; all fields of `Rows` but the cache."""
    lengths, limits, counts = rows
    zero = jnp.zeros_like(lengths)
    model = nnx.merge(graph, state)
    live = limits > 0
    choice, counts, stopped = _choose(model, constants, last, params, counts, zero, live, plan)
    fields = {
        "length": lengths,
        "token": choice.token,
        "generated": zero + 1,
        "limit": limits,
        "done": stopped | (limits <= 1),
        "counts": counts,
    }
    return fields, Emitted(choice, live)


def _decode_many(
    graph: nnx.GraphDef,
    constants: _Constants,
    state: nnx.State,
    rows: Rows,
    params: RowParameters,
    plan: Plan,
    steps: int,
) -> tuple[Rows, Emitted]:
    model = nnx.merge(graph, state)

    def step(rows: Rows, _: None) -> tuple[Rows, Emitted]:
        live = ~rows.done
        # A done row keeps its place: its token goes where no slot is, and is dropped.
        at = jnp.where(live, rows.length, rows.cache.capacity)
        hidden, cache = model(rows.token[:, None], rows.cache, at, rows.length + live)
        choice, counts, stopped = _choose(
            model, constants, hidden[:, 0], params, rows.counts, rows.generated, live, plan
        )
        generated = rows.generated + live
        after = Rows(
            cache=cache,
            length=rows.length + live,
            token=jnp.where(live, choice.token, rows.token),
            generated=generated,
            limit=rows.limit,
            done=rows.done | stopped | (generated >= rows.limit),
            counts=counts,
        )
        return after, Emitted(choice, live)

    return lax.scan(step, rows, length=steps)
