"""From token ids to text: one batch of rows through the engine, a piece at a time."""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine.engine import Emitted, Engine, Prompt, check_fits
from qwen_jax.engine.memory import compile_seconds
from qwen_jax.engine.sampling import Logprobs, Sampling, is_whole, plan_rows
from qwen_jax.errors import UserError
from qwen_jax.text.prompt import own_stop_ids
from qwen_jax.text.streaming import TextStream
from qwen_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """One row's work: a prompt's ids, and how to answer it. With 0 tokens the row is idle.

    Attributes:
        tokens: the prompt's ids.
        max_tokens: the most tokens to generate.
        sampling: how tokens are chosen.
        stop: strings that end the text, control tokens included; they are cut off.
        stop_ids: ids that end the text, besides those of the model; they are not shown.
    """

    tokens: Sequence[int]
    max_tokens: int = 256
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not is_whole(self.max_tokens):
            raise UserError(f"max_tokens is {self.max_tokens!r:.60}, but it must be whole.")
        if self.max_tokens < 0:
            raise UserError(f"max_tokens is {self.max_tokens}, but it must not be negative.")
        if not isinstance(self.sampling, Sampling):
            raise UserError(
                f"sampling is {self.sampling!r:.60}, but it must be a Sampling, as "
                "qwen_jax.Sampling(temperature=0.8)."
            )
        if not isinstance(self.stop_ids, Iterable):
            raise UserError(f"stop_ids is {self.stop_ids!r:.60}, but it must be a list of ids.")


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A chosen token's log-probability under the model, and the likeliest ones', best first.

    They are the model's own: before bias, penalties, temperature and filters.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """What became of one request.

    Attributes:
        text: without control tokens and the stop token, cut before a stop string.
        tokens: every id the model chose, the stop token included.
        finish_reason: "stop" (a stop token or string), "length" (max_tokens or the context
            is used up) or "interrupted".
        prompt_tokens: ids in the prompt.
        logprobs: one entry a token, where asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds and tokens of one batch; compilation is counted apart, in none of the phases."""

    prompt_tokens: int
    prompt_seconds: float
    generated_tokens: int
    generation_seconds: float
    first_token_seconds: float
    compile_seconds: float

    @property
    def prompt_rate(self) -> float:
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def generation_rate(self) -> float:
        """Tokens a second after each row's first, which comes with the prompt."""
        return self.generated_tokens / max(self.generation_seconds, 1e-9)


class Batch:
    """Requests that run together. Iterating, once, runs them and yields each row's new text.

    Args:
        requests: one a row, at least one.
        chunk: decode steps between two looks at the result.
        top_logprobs: None for no log-probabilities, else how many of the likeliest to keep.

    Raises:
        UserError: a prompt is empty or too long, a setting doesn't fit the vocabulary, or the
            batch doesn't fit the device.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        *,
        chunk: int,
        top_logprobs: int | None = None,
    ):
        if top_logprobs is not None and not 0 <= top_logprobs <= tokenizer.vocab_size:
            raise UserError(
                f"top_logprobs is {top_logprobs}, but it must be from 0 to the "
                f"{tokenizer.vocab_size} tokens of {engine.config.source}."
            )
        self._engine, self._chunk = engine, chunk
        self._requests = requests
        self._prompts = [Prompt(r.tokens, r.max_tokens) for r in requests]
        check_fits(engine, self._prompts, len(requests))
        self._plan, self._params = plan_rows(
            [r.sampling for r in requests],
            engine.config.vocab_size,
            logprobs=top_logprobs is not None,
            top_logprobs=top_logprobs or 0,
        )
        self._rows = [_Row(r, engine, tokenizer, top_logprobs is not None) for r in requests]
        self._marks: list[tuple[float, float]] = []

    @property
    def completions(self) -> list[Completion]:
        """One a request; of those still running, what there is so far."""
        return [self.completion(row) for row in range(len(self._rows))]

    def completion(self, row: int) -> Completion:
        """One row's part of `completions`."""
        return self._rows[row].completion()

    def finished(self, row: int) -> bool:
        """Whether a row's completion is final."""
        return self._rows[row].finish_reason is not None

    @property
    def timings(self) -> Timings:
        """Of what has run so far; all zero before the first token."""
        marks = self._marks if len(self._marks) > 1 else [(0.0, 0.0)] * 2
        (start, compiled0), (first, compiled1), (end, compiled2) = *marks[:2], marks[-1]
        generated = sum(max(len(row.tokens) - 1, 0) for row in self._rows)
        return Timings(
            prompt_tokens=sum(len(r.tokens) for r in self._requests if r.max_tokens > 0),
            prompt_seconds=first - start - (compiled1 - compiled0),
            generated_tokens=generated,
            generation_seconds=end - first - (compiled2 - compiled1),
            first_token_seconds=first - start,
            compile_seconds=compiled2 - compiled0,
        )

    def __iter__(self) -> Iterator[list[str]]:
        if self._marks:
            raise RuntimeError("a batch runs once; make another from the same requests")
        plan, params = self._plan, self._params
        self._mark()
        state, first = self._engine.prefill(self._prompts, plan, params)
        steps_left = max(row.limit for row in self._rows) - 1
        # The device knows the model's stop tokens and limits by itself.
        tells = any(row.ends_on_host for row in self._rows)

        def next_chunk() -> Emitted | None:
            nonlocal state, steps_left
            if steps_left <= 0 or all(row.finish_reason for row in self._rows):
                return None
            if tells:
                ended = np.array([row.finish_reason is not None for row in self._rows])
                state = dataclasses.replace(state, done=state.done | jnp.asarray(ended))
            state, emitted = self._engine.decode_many(state, params, plan, self._chunk)
            steps_left -= self._chunk
            return emitted

        # A GPU computes the next chunk while the host reads this one. A CPU would only
        # compete with itself, for a chunk that may not be needed.
        ahead = self._engine.platform != "cpu"
        # The first token is shown before the decode loop is compiled.
        yield self._read(first, one_step=True)
        pending = next_chunk()
        while pending is not None:
            upcoming = next_chunk() if ahead else None
            yield self._read(pending)
            pending = upcoming if ahead else next_chunk()

    def _mark(self) -> None:
        self._marks.append((time.perf_counter(), compile_seconds()))

    def _read(self, emitted: Emitted, *, one_step: bool = False) -> list[str]:
        """Hands each row what a chunk of steps, or one step without a leading axis, chose for it;
        returns the text that completes."""
        choice = emitted.choice
        wanted = (choice.token, emitted.live, choice.finite, choice.banned)
        # A CPU's memory is the host's: nothing has to be fetched.
        on_host = self._engine.platform == "cpu"
        fetched = map(np.asarray, wanted) if on_host else jax.device_get(wanted)
        token, live, finite, banned = map(np.atleast_2d, fetched)
        self._mark()
        if not finite[live].all():
            raise UserError(
                f"The logits are not finite in {self._engine.cache_dtype}: a value has overflowed; "
                "choose --dtype=bfloat16 or float32, and check the model's file."
            )
        if banned[live].any():
            raise UserError(
                "sampling.logit_bias bans every token there is, so that nothing is left to choose; "
                "leave some without -inf."
            )
        logprobs = jax.device_get(choice.logprobs)
        if one_step:
            logprobs = jax.tree.map(lambda x: x[None], logprobs)
        # As lists, since Python asks for one token after another; a row is live up to its end.
        tokens, counts = token.T.tolist(), live.sum(0).tolist()
        return [
            row.feed(tokens[index][: counts[index]], logprobs, index)
            for index, row in enumerate(self._rows)
        ]


class _Row:
    """A request's text while it grows."""

    def __init__(self, request: Request, engine: Engine, tokenizer: Tokenizer, logprobs: bool):
        self.request = request
        self.limit = min(request.max_tokens, engine.config.context_length - len(request.tokens))
        self.tokens: list[int] = []
        self.finish_reason: str | None = None if self.limit > 0 else "length"
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None
        own = row_stop_ids(request, tokenizer)
        self._stop_ids = {*engine.stop_ids, *own}
        self._stream = TextStream(tokenizer, request.stop, hidden=self._stop_ids)
        self._text: list[str] = []
        # Whether the host alone knows that the row has ended.
        self.ends_on_host = bool(request.stop or own)

    def feed(self, tokens: Sequence[int], logprobs: Logprobs | None, row: int) -> str:
        """Takes the row's live tokens of a chunk of steps; returns text safe to show."""
        if self.finish_reason is not None:
            return ""
        piece, before = "", len(self.tokens)
        for step, token in enumerate(tokens):
            self.tokens.append(token)
            if self._logprobs is not None:
                assert logprobs is not None
                chosen, ids, top = (x[step, row] for x in logprobs)
                asked = ids >= 0  # There is room for more than were asked for.
                pairs = tuple(zip(ids[asked].tolist(), top[asked].tolist(), strict=True))
                self._logprobs.append(TokenLogprob(token, float(chosen), pairs))
            if self.request.stop:  # Which token completes one has to be known.
                piece += self._stream.feed([token])
            if self._stream.stopped or token in self._stop_ids:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.limit:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                break
        if not self.request.stop:
            piece = self._stream.feed(self.tokens[before:])
        if self.finish_reason is not None and len(self.tokens) > before:
            piece += self._stream.finish()
        self._text.append(piece)
        return piece

    def completion(self) -> Completion:
        return Completion(
            text="".join(self._text),
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason or "interrupted",
            prompt_tokens=len(self.request.tokens),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
        )


def row_stop_ids(request: Request, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end this text besides the model's. Raises UserError where one is no token."""
    for token in request.stop_ids:
        if not is_whole(token) or not 0 <= token < tokenizer.vocab_size:
            raise UserError(
                f"stop_ids holds {token!r:.40}, but token ids are 0 to {tokenizer.vocab_size - 1}."
            )
    return (*request.stop_ids, *own_stop_ids(tokenizer, request.tokens))
