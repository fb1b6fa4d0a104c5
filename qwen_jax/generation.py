"""From token ids to text: requests through the engine's slots, a piece of text at a time."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple

from qwen_jax.completions import Completion, Piece, StreamedText, Timings, TokenLogprob
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.memory import compile_seconds
from qwen_jax.engine.replicas import line_for
from qwen_jax.engine.texts import News, Text
from qwen_jax.errors import UserError
from qwen_jax.requests import Request, check_fits
from qwen_jax.scoring import Score, Scored, ToScore, to_be_scored
from qwen_jax.text.matching import Matcher
from qwen_jax.text.prompt import own_stop_ids
from qwen_jax.text.streaming import TextStream
from qwen_jax.text.tokenizer import Tokenizer


class NotYet:
    """What an iterable of requests may give where the next one has not arrived: it is asked again
    after the next turn. It takes a number of its own."""


_PAUSE = 0.0005
"""Seconds until it is asked again where nothing else is to be done."""

Fail = Callable[[int, UserError], None]
"""Called with the number of a request that can't go on, and why."""


class Generation:
    """Requests through the engine's slots. Iterating, once, yields each one's text as it comes.

    Requests are taken from their iterable when there is soon room for them, so that it may be as
    long as it likes. They end in any order.

    Args:
        requests: what to answer, or `NotYet`; their places in it are the pieces' numbers.
        fail: told of requests that can't go on, of which nothing more comes; the others do. By
            default the first of them ends it all.

    Raises:
        UserError: while iterating, unless `fail` is told: a prompt is empty or too long, a setting
            doesn't fit the vocabulary, one text doesn't fit the device, its constraint proves to be
            too much, every token is banned, or logits are not finite.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        requests: Iterable[Request | NotYet],
        fail: Fail | None = None,
    ):
        self._engine, self._tokenizer = engine, tokenizer
        self._requests = enumerate(requests)
        self._fail = fail
        self._running: Running | None = None

    @property
    def unfinished(self) -> dict[int, Completion]:
        """What there is so far of the requests that have begun and not ended, by their number."""
        return {} if self._running is None else self._running.unfinished

    @property
    def timings(self) -> Timings:
        """Of what has run so far; all zero before the first token."""
        return Timings() if self._running is None else self._running.timings

    def __iter__(self) -> Generator[Piece, None, None]:
        running = self._running = Running(self._engine, self._tokenizer)
        try:
            yield from self._run(running)
        finally:
            running.close()

    def _run(self, running: "Running") -> Iterator[Piece]:
        more = True
        while more or not running.idle:
            while more and running.wants_more:
                number, request = next(self._requests, (0, None))
                if isinstance(request, NotYet):
                    if running.idle:
                        time.sleep(_PAUSE)
                    break
                if more := request is not None:
                    try:
                        running.add(number, request)
                    except UserError as error:
                        if self._fail is None:
                            raise UserError(f"request {number}: {error}") from error
                        self._fail(number, error)
            for news in running.turn():
                if isinstance(news, Failed):
                    if self._fail is None:
                        raise news.error
                    self._fail(*news)
                elif isinstance(news, Piece):
                    yield news


class Failed(NamedTuple):
    """The request of this number can't go on."""

    number: int
    error: UserError


class Running:
    """Requests in the engine's slots and in line for them, by numbers of the caller's."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self._engine, self._tokenizer = engine, tokenizer
        self._scheduler = line_for(engine)
        self._rows: dict[Text, _Row] = {}
        self._scored: dict[Text, int] = {}
        self._start, self._compiled = time.perf_counter(), compile_seconds()
        self._sums = Timings()

    @property
    def unfinished(self) -> dict[int, Completion]:
        """What there is so far of the requests that have not ended."""
        return {row.number: row.completion() for row in self._rows.values()}

    @property
    def timings(self) -> Timings:
        """Of what has run so far; all zero before the first token."""
        return self._sums

    @property
    def idle(self) -> bool:
        """Whether a turn would do nothing."""
        return self._scheduler.idle

    @property
    def wants_more(self) -> bool:
        """Whether a request that is added now could take its turn at once, or soon."""
        return self._scheduler.wants_more

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return self._scheduler.waiting

    def add(self, number: int, request: Request | ToScore) -> None:
        """Puts a request at the end of the line.

        Raises UserError where it is empty, too long, or doesn't fit the vocabulary or the device.
        """
        if isinstance(request, ToScore):
            text = to_be_scored(self._engine, request.tokens[:1], request.tokens[1:])
            self._scored[text] = number
            self._scheduler.add(text)
            return
        row = _Row(number, request, self._engine, self._tokenizer)
        self._rows[row.text] = row
        self._scheduler.add(row.text)

    def cancel(self, number: int) -> None:
        """Ends a request wherever it is; nothing more is told of it."""
        for text in [text for text, row in self._rows.items() if row.number == number]:
            self._scheduler.cancel(text)
            del self._rows[text]
        for text in [text for text, scored in self._scored.items() if scored == number]:
            self._scheduler.cancel(text)
            del self._scored[text]

    def turn(self) -> Iterator[Piece | Failed | Scored]:
        """Does what can be done now, and tells what is known by then."""
        for news in self._scheduler.turn():
            if news.text in self._scored:
                yield Scored(self._scored.pop(news.text), Score.of(news))
                continue
            if news.text not in self._rows:
                continue  # A stop string in what was told of it just before has ended it.
            row = self._rows[news.text]
            if news.error is not None:
                yield Failed(row.number, UserError(news.error))
                del self._rows[news.text]  # Who ends with the error may still ask for its text.
                continue
            before = len(row.tokens)
            piece = row.feed(news)
            over = row.finish_reason is not None
            if over:
                self._scheduler.cancel(news.text)
                del self._rows[news.text]
            self._count(row, before)
            if piece or over:
                yield Piece(row.number, row.streamed(piece), row.completion() if over else None)

    def close(self) -> None:
        """Lets go of all that is left."""
        self._scheduler.close()

    def _count(self, row: "_Row", before: int) -> None:
        """Adds what a row has grown by, from so many tokens on."""
        now, compiled, sums = time.perf_counter(), compile_seconds(), self._sums
        first = before == 0
        compiling = compiled - self._compiled
        drafted, accepted = row.drafts()
        self._sums = Timings(
            sums.prompt_tokens + (len(row.request.tokens) if first else 0),
            sums.shared_tokens + (row.text.shared_tokens if first else 0),
            sums.generated_tokens + len(row.tokens) - before,
            now - self._start - compiling,
            sums.first_token_seconds or now - self._start,
            compiling,
            sums.drafted_tokens + drafted,
            sums.accepted_tokens + accepted,
        )


class _Row:
    """A request's text while it grows."""

    def __init__(self, number: int, request: Request, engine: Engine, tokenizer: Tokenizer):
        self.number, self.request = number, request
        check_fits(request, engine, tokenizer)
        limit = engine.room(request.tokens, request.max_tokens)
        held = request.constraint
        matcher = None if held is None else Matcher(held, tokenizer)
        asked = request.sampling, request.top_logprobs
        self.text = Text(request.tokens, limit, *asked, constraint=matcher)
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._logprobs: list[TokenLogprob] | None = None if request.top_logprobs is None else []
        self._stop_ids = {
            *engine.spec.stop_ids,
            *request.stop_ids,
            *own_stop_ids(tokenizer, request.tokens),
        }
        self._stream = TextStream(tokenizer, request.stop, hidden=self._stop_ids)
        self._pieces: list[str] = []
        self._told = 0
        self._drafts = 0, 0

    def drafts(self) -> tuple[int, int]:
        """How many tokens were drafted and accepted since the last time this was asked."""
        if (record := self.text.record) is None:
            return 0, 0
        before, self._drafts = self._drafts, (record.drafted, record.accepted)
        return record.drafted - before[0], record.accepted - before[1]

    def streamed(self, piece: str) -> StreamedText:
        """New text, with what has come since the last of it."""
        text, new = StreamedText(piece), slice(self._told, None)
        self._told = len(self.tokens)
        text.tokens, text.finish_reason = tuple(self.tokens[new]), self.finish_reason
        text.logprobs = None if self._logprobs is None else tuple(self._logprobs[new])
        return text

    def feed(self, news: News) -> str:
        """Takes the new tokens; returns text safe to show."""
        piece, before = "", len(self.tokens)
        for step, token in enumerate(news.tokens):
            self.tokens.append(token)
            if self._logprobs is not None:
                assert news.logprobs is not None
                logprob, top = news.logprobs[step]
                self._logprobs.append(TokenLogprob(token, logprob, tuple(top)))
            if self.request.stop:  # Which token completes one has to be known.
                piece += self._stream.feed([token])
            if self._stream.stopped or token in self._stop_ids:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.text.limit:
                self.finish_reason = "length"
            if self.finish_reason is not None:
                break
        if not self.request.stop:
            piece = self._stream.feed(self.tokens[before:])
        if self.finish_reason is not None:
            piece += self._stream.finish()
        self._pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        return Completion(
            text="".join(self._pieces),
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason or "interrupted",
            prompt_tokens=len(self.request.tokens),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
        )
