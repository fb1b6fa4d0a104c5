"""The engine's one thread: requests of all callers take turns in it, and each hears of its own."""

import asyncio
import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import NamedTuple

from absl import logging

from qwen_jax.api import Model
from qwen_jax.completions import Piece, Timings
from qwen_jax.errors import UserError
from qwen_jax.generation import Failed, Running
from qwen_jax.requests import Request
from qwen_jax.scoring import Scored, ToScore
from qwen_jax.serving.refusal import RefusalError

Work = Request | ToScore
News = Piece | Scored
LONGEST_RETRY = 60
"""Seconds after which a caller is told to come back, at most."""


class Told(NamedTuple):
    """News of the request at this place in a caller's list."""

    place: int
    news: News | RefusalError


class _Entry(NamedTuple):
    request: Work
    tell: Callable[[News | RefusalError], None]
    begun: float


class Worker:
    """Takes requests from an event loop's thread and drives the engine in one of its own.

    Args:
        model: nobody else may use its engine meanwhile.
        queue: how many requests may wait for a slot.
    """

    def __init__(self, model: Model, queue: int):
        self._model = model
        self.most = model.engine.shapes.slots + queue
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._entries: dict[int, _Entry] = {}
        self._arrived: deque[int] = deque()
        self._left: deque[int] = deque()
        self._closing = False
        self._mean = 1.0  # seconds of an answer, of late
        self._before = Timings()
        self._running = Running(model.engine, model.tokenizer)
        self._thread = threading.Thread(target=self._run, name="serve", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after its turn; what has not ended is told of no more."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def present(self) -> int:
        """Requests that run or wait."""
        return len(self._entries)

    @property
    def waiting(self) -> int:
        """Those of them that have no slot yet."""
        return self._running.waiting + len(self._arrived)

    @property
    def timings(self) -> Timings:
        """Tokens of all that has run."""
        return self._before + self._running.timings

    def submit(self, requests: Sequence[Work]) -> "Answers":
        """Puts requests at the end of the line; called where an event loop runs.

        Raises:
            RefusalError: with them more would wait than may.
        """
        self.check_room(len(requests))
        answers = Answers(self)
        with self._changed:
            for index, request in enumerate(requests):
                number = next(self._numbers)
                self._entries[number] = _Entry(request, answers.teller(index), time.perf_counter())
                self._arrived.append(number)
                answers.numbers.append(number)
            self._changed.notify()
        return answers

    def check_room(self, count: int) -> None:
        """Raises RefusalError where so many more would be more than may wait."""
        if count > self.most:
            text = f"{count} answers are asked for at once, but {self.most} fit; ask for fewer."
            raise RefusalError(400, text, param="n")
        if len(self._entries) + count > self.most:
            turns = len(self._entries) / self._model.engine.shapes.slots
            retry = max(1, min(LONGEST_RETRY, round(self._mean * turns)))
            text = f"{len(self._entries)} answers are being made or wait; come back in {retry} s."
            headers = {"Retry-After": str(retry)}
            raise RefusalError(429, text, code="queue_full", headers=headers)

    def drop(self, numbers: Sequence[int]) -> None:
        """Ends requests whose caller has gone, if they have not ended."""
        with self._changed:
            for number in numbers:
                if self._entries.pop(number, None) is not None:
                    self._left.append(number)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._arrived or self._left or self._closing) and self._running.idle:
                    self._changed.wait()
                if self._closing:
                    break
                arrived, left = list(self._arrived), list(self._left)
                self._arrived.clear()
                self._left.clear()
            try:
                self._turn(arrived, left)
            except Exception as error:
                # A device that fails fails all who were on it; the next ones may fare better.
                self._fail(error)
        self._running.close()

    def _turn(self, arrived: Sequence[int], left: Sequence[int]) -> None:
        for number in arrived:
            if (entry := self._entries.get(number)) is None:
                continue  # gone before its turn
            try:
                self._running.add(number, entry.request)
            except UserError as error:
                self._tell(number, RefusalError.of(error))
        for number in left:
            self._running.cancel(number)
        for news in self._running.turn():
            if isinstance(news, Failed):
                self._tell(news.number, RefusalError.of(news.error))
            else:
                self._tell(news.number, news)

    def _tell(self, number: int, news: News | RefusalError) -> None:
        over = not isinstance(news, Piece) or news.completion is not None
        with self._changed:
            entry = self._entries.pop(number, None) if over else self._entries.get(number)
        if entry is None:
            return
        if over:
            self._mean += 0.1 * (time.perf_counter() - entry.begun - self._mean)
        entry.tell(news)

    def _fail(self, error: Exception) -> None:
        logging.exception("The engine failed; what was on it is told so.")
        refusal = RefusalError(500, f"The engine failed: {type(error).__name__}; try again.")
        for number in list(self._entries):
            self._tell(number, refusal)
        self._before += self._running.timings
        with contextlib.suppress(Exception):
            self._running.close()
        self._running = Running(self._model.engine, self._model.tokenizer)


class Answers:
    """News of a caller's requests, for its event loop. To be closed, whatever comes."""

    def __init__(self, worker: Worker):
        self.numbers: list[int] = []
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[Told] = asyncio.Queue()

    def teller(self, index: int) -> Callable[[News | RefusalError], None]:
        """What the worker's thread calls with news of a request."""

        def tell(news: News | RefusalError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._told.put_nowait, Told(index, news))

        return tell

    async def pieces(self) -> AsyncGenerator[tuple[int, News], None]:
        """All of them, as they come, with the request's index. Raises RefusalError where one can't
        be answered."""
        left = len(self.numbers)
        while left:
            index, news = await self._told.get()
            if isinstance(news, RefusalError):
                raise news
            left -= isinstance(news, Scored) or news.completion is not None
            yield index, news

    def close(self) -> None:
        """Frees the slots of what has not ended."""
        self._worker.drop(self.numbers)
