"""One scheduler for all who ask a model at the same time, on any threads.

So their texts share its steps, whether they came in one list or in a hundred calls, and nobody
waits for pages that another's texts hold: whoever wants news takes a turn for all, one thread at a
time, and who waits meanwhile hears what came of its own.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from qwen_jax.engine.texts import News, Text
from qwen_jax.errors import UserError

if TYPE_CHECKING:
    from qwen_jax.engine.replicas import Replicas
    from qwen_jax.engine.scheduler import Scheduler


Line: TypeAlias = "Scheduler | Replicas"


class Shared:
    """The scheduler of a model, which is there as long as somebody has joined."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._clients: set[Client] = set()
        self._owners: dict[Text, Client] = {}
        self._driver: int | None = None
        self._scheduler: Line | None = None
        self._between: deque[Callable[[Line], None]] = deque()

    def join(self, client: "Client") -> None:
        """It will have texts."""
        with self._changed:
            self._clients.add(client)

    def part(self, client: "Client") -> None:
        """It will have none any more."""

        def end(scheduler: "Line") -> None:
            if not self._clients:
                scheduler.close()
                self._scheduler = None

        with self._changed:
            self._clients.discard(client)
            self._between_turns(end)

    def add(self, text: Text, client: "Client") -> None:
        """Puts a text at the end of the line."""
        with self._changed:
            if self._scheduler is None:
                self._scheduler = client.make()
            self._owners[text] = client
            self._between_turns(lambda scheduler: scheduler.add(text))

    def cancel(self, text: Text) -> None:
        """Ends a text wherever it is; nothing more is told of it."""
        with self._changed:
            if (owner := self._owners.pop(text, None)) is not None:
                owner.told = [news for news in owner.told if news.text is not text]
                self._between_turns(lambda scheduler: scheduler.cancel(text))

    def texts(self, client: "Client") -> list[Text]:
        """A client's that have not ended."""
        with self._changed:
            return [text for text, owner in self._owners.items() if owner is client]

    def turn(self, client: "Client") -> list[News]:
        """What there is for a client: where there is nothing yet, by a turn for all, or by that of
        another thread.

        Raises:
            UserError: as a scheduler's turn does; or another's failed, with this client's texts.
            Exception: a device failed. Then nobody's texts go on.
        """
        news: list[News] = []
        try:
            with self._changed:
                while self._driver is not None and not client.told and client.error is None:
                    self._changed.wait()
                if client.error is not None:
                    error, client.error = client.error, None
                    raise error
                drives = not client.told and client in self._owners.values()
                if drives:
                    self._driver = threading.get_ident()
            if drives:
                assert self._scheduler is not None
                news = self._scheduler.turn()
        except BaseException as error:
            if self._driver == threading.get_ident():
                self._fail(error, client)
            raise
        finally:
            if self._driver == threading.get_ident():
                self._end_turn(news)
        with self._changed:
            told, client.told = client.told, []
        return told

    def _end_turn(self, news: list[News]) -> None:
        with self._changed:
            self._driver = None
            for one in news:
                if (owner := self._owners.get(one.text)) is not None:
                    owner.told.append(one)
                    if one.over:
                        del self._owners[one.text]
            self._do()
            self._changed.notify_all()

    def _between_turns(self, do: "Callable[[Line], None]") -> None:
        self._between.append(do)
        if self._driver is None:
            self._do()

    def _do(self) -> None:
        while self._between:
            do = self._between.popleft()
            if self._scheduler is not None:
                do(self._scheduler)

    def _fail(self, error: BaseException, by: "Client") -> None:
        with self._changed:
            scheduler, self._scheduler = self._scheduler, None
            self._between.clear()
            for client in {*self._owners.values()} - {by}:
                client.error = UserError(
                    "The engine was stopped while another request was at it "
                    f"({type(error).__name__}: {error}); ask again."
                )
            self._owners.clear()
            if scheduler is not None:
                with contextlib.suppress(Exception):
                    scheduler.close()


class Client:
    """What a scheduler is, for one of those who share one.

    Args:
        make: the scheduler, where nobody else has joined.
        slots: of all.

    Attributes:
        told: news that have not been asked for yet.
        error: why its texts don't go on, until it has been told.
    """

    def __init__(self, shared: Shared, make: "Callable[[], Line]", slots: int):
        self._shared, self.make, self._slots = shared, make, slots
        self.told: list[News] = []
        self.error: UserError | None = None
        shared.join(self)

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do or to tell."""
        return not (self.told or self.error or self._shared.texts(self))

    @property
    def wants_more(self) -> bool:
        """Whether a text that is added now could take its turn at once, or soon."""
        return len(self._shared.texts(self)) < 2 * self._slots

    @property
    def waiting(self) -> int:
        """Texts that have no slot yet."""
        return sum(not text.pages for text in self._shared.texts(self))

    def add(self, text: Text) -> None:
        """Puts a text at the end of the line. It must fit: see `Engine.room`."""
        self._shared.add(text, self)

    def cancel(self, text: Text) -> None:
        """Ends a text wherever it is; nothing more is told of it."""
        self._shared.cancel(text)

    def turn(self) -> list[News]:
        """Does what can be done now, and tells what is known by then: see `Shared.turn`."""
        return self._shared.turn(self)

    def close(self) -> None:
        """Lets go of all that is left, once nothing is to be told any more."""
        for text in self._shared.texts(self):
            self.cancel(text)
        self._shared.part(self)
